"""Folders of transformers changed: experts taken out, averaged, or made; each is written as a folder again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.errors import UserError
from moekit.experts import AddNoise
from moekit.huggingface import UPCYCLED, adopt_folder, choose_kept, layout_of, merge, prune, upcycle, write_folder
from moekit.huggingface.folder import folder_files, on_meta
from moekit.huggingface.pruning import adopted_layers
from moekit.huggingface.saving import require_free
from moekit.runs.folders.measuring import measured_use
from moekit.runs.folders.text import FolderText, TextChoice, folder_text
from moekit.surgery.pruning import Order
from moekit.wording import counted

_WAYS: Mapping[Order, str] = {
    "utilisation": "the most used", "reversed": "the least used", "random": "drawn at random",
    "reap": "those of the highest REAP saliency (arXiv:2510.13999)",
}  # fmt: skip


def prune_folder(
    folder: Path,
    out: Path,
    keep: int | float,
    order: Order,
    choice: TextChoice | None,
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> Any:
    """Write a folder of transformers with fewer experts of another.

    Args:
        folder: one of an architecture that is adopted.
        out: the new folder.
        keep: the number or share of experts to keep in each layer.
        order: how they are chosen.
        choice: the text on which they are; needed unless at random.
        seed: the seed of a random choice.
        overwrite: replace what is there.

    Returns:
        The model.

    Raises:
        UserError: see `moekit.huggingface.choose_kept`, `folder_text` and `moekit.huggingface.write_folder`.
    """
    require_free(out, like=folder, overwrite=overwrite, inputs={"--data.path": choice.path if choice else None})
    if order != "random" and choice is None:
        raise UserError(f"--by {order} needs text: give --data.source and --data.path, or --by random.")
    if order == "random" and choice is not None:
        raise UserError("--data.* is the text on which experts are chosen: leave it out with --by random.")
    text = _text_of(folder, choice)
    model = adopt_folder(folder, aux=None)
    layers = adopted_layers(model)
    choose_kept(model, keep, "random")  # before anything is measured
    data, load = [], None
    if text is not None:
        use = measured_use(model, text)
        load = {path: one.saliency if order == "reap" else one.load for path, one in use.items()}
        data = [f"Experts were chosen on {text.said}."]
    kept = choose_kept(model, keep, order, load=load, seed=seed)
    few, of = next(iter(kept.values())).numel(), next(iter(layers.values())).num_experts
    drawn = f" with seed {seed}" if order == "random" else ""
    change = f"{few} of {of} experts are kept in each of {counted(len(layers), 'sparse layer')}: {_WAYS[order]}{drawn}."
    pruned = prune(model, kept)
    write_folder(pruned, out, like=folder, overwrite=overwrite, changes=[change], data=data, tags=["pruned"])
    return pruned


def merge_folder(
    folder: Path, out: Path, choice: TextChoice | None, *, scale: float = 1.0, overwrite: bool = False
) -> Any:
    """Write the dense folder whose feed-forwards are averages of another's experts.

    Args:
        folder: one of an architecture that `moekit.huggingface.merge` takes.
        out: the new folder.
        choice: the text by whose load experts are weighed; None = all alike.
        scale: multiplies what the averages write.
        overwrite: replace what is there.

    Returns:
        The model.

    Raises:
        UserError: see `moekit.huggingface.merge`, `folder_text` and `moekit.huggingface.write_folder`.
    """
    require_free(out, like=folder, overwrite=overwrite, inputs={"--data.path": choice.path if choice else None})
    text = _text_of(folder, choice)
    model = adopt_folder(folder, aux=None)
    data, load = [], None
    if text is not None:
        load = {path: one.load for path, one in measured_use(model, text).items()}
        data = [f"Experts were weighed by their use on {text.said}."]
    dense = merge(model, load, scale=scale)
    scaled = f" times {scale:g}" if scale != 1 else ""
    how = "weighed by their use" if load else "all alike"
    change = f"The experts of each layer were averaged, {how}{scaled}, into one dense feed-forward."
    write_folder(dense, out, like=folder, overwrite=overwrite, changes=[change], data=data)
    return dense


def upcycle_folder(
    folder: Path,
    out: Path,
    num_experts: int,
    k: int | None,
    *,
    every: int = 1,
    noise: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
) -> Any:
    """Write the sparse folder that a dense one becomes; see `moekit.huggingface.upcycle`.

    Raises:
        UserError: see there, and `moekit.huggingface.write_folder`.
    """
    require_free(out, like=folder, overwrite=overwrite)
    kind = type(on_meta(folder, None))
    if kind.__name__ not in UPCYCLED:
        raise UserError(
            f"transformers has no sparse model that {kind.__name__} could become: known are {', '.join(UPCYCLED)}."
        )
    folder_files(folder)  # whole, and no pickles
    dense = kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    perturb = AddNoise(noise) if noise else None
    sparse = upcycle(dense, num_experts, k, every=every, perturb=perturb, scale=scale, seed=seed, aux=None)
    layer = next(iter(adopted_layers(sparse).values()))
    noisy = f", with noise of {noise:g} standard deviations" if noise else ""
    change = (
        f"Feed-forwards became {counted(num_experts, 'expert')} each, copies of them{noisy}, {layer.k:g} for a token; "
        "routers are drawn at random. The model has not been trained since."
    )
    write_folder(sparse, out, like=folder, overwrite=overwrite, changes=[change], tags=["upcycled"])
    return sparse


def _text_of(folder: Path, choice: TextChoice | None) -> FolderText | None:
    """The training text, if any is chosen, once the folder is known to be whole: before weights are read."""
    folder_files(folder)
    return None if choice is None else folder_text(folder, choice, "train")


def size_of(model: torch.nn.Module) -> str:
    """Parameters and experts, in a line."""
    layout = layout_of(model)
    experts = ", ".join(str(count) for count in sorted({layer.num_experts for layer in layout.layers}))
    return f"{layout.parameters:,} parameters, {f'{experts} experts in a layer' if experts else 'dense'}"
