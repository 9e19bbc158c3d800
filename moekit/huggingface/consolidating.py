"""Folders of transformers made again of what was trained from one: of a checkpoint, or of a model in memory.

consolidate_folder("last.ckpt", like="olmoe", out="trained")   # a sharded checkpoint, in one process
consolidate_model(model, like="olmoe", out="trained")          # a model that this process holds whole
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.huggingface.adopt import adopt
from moekit.huggingface.folder import compute_buffers, folder_files, give_memory, on_meta
from moekit.huggingface.saving import write_folder
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.parallel.checkpoint.reader import StoredCheckpoint
from moekit.parallel.checkpoint.state import model_tensors
from moekit.surgery.adapters import is_adapter, merged_state


def consolidate_folder(checkpoint: PathLike, like: PathLike, out: PathLike) -> None:
    """Make a folder of transformers of a sharded checkpoint, in one process, whatever the layout it was trained in.

    Low-rank adapters of the checkpoint are merged.

    Args:
        checkpoint: a folder that `ExpertParallelStrategy` or `moekit.parallel.Checkpointer` wrote.
        like: the folder of `adopt_folder` that training began with; its tokenizer goes along, and its type of weights
            stays.
        out: a new or empty folder.

    Raises:
        UserError: the checkpoint is broken or of another model, or `out` holds something.
    """
    target = _require_empty(out)
    stored = StoredCheckpoint(checkpoint)
    place = Path(os.path.abspath(like))
    model, wanted = _whole(place)
    first = next(iter(wanted))
    entries = stored.index.under("model/")
    prefixes = [name.removesuffix(first) for name in entries if name == first or name.endswith(f".{first}")]
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for prefix in prefixes:
        found = {n: entries[prefix + n].shape for n in wanted if prefix + n in entries}
        if found == shapes:
            pairs = {
                name.removeprefix(prefix): entry.empty()
                for name, entry in entries.items()
                if name.startswith(prefix) and is_adapter(name)
            }
            stored.fill({f"model/{prefix}{name}": tensor for name, tensor in {**wanted, **pairs}.items()})
            _save(model, wanted, {**wanted, **pairs}, place, target)
            return
    raise UserError(
        f"the checkpoint {stored.folder} must hold the tensors of {place}, an adopted {type(model).__name__}: it does "
        "not, or not in these shapes. Name the folder that training began with."
    )


def consolidate_model(model: nn.Module, like: PathLike, out: PathLike) -> None:
    """Make a folder of transformers of an adopted model that one process holds whole; its adapters are merged there.

    The model stays as it is. `save_pretrained` writes what it holds; this writes the type of weights, the tokenizer and
    the other small files of the folder that training began with.

    Args:
        model: adopted, of the folder `like`.
        like: the folder of `adopt_folder` that training began with.
        out: a new or empty folder.

    Raises:
        UserError: the model is of another folder, or `out` holds something.
    """
    target = _require_empty(out)
    place = Path(os.path.abspath(like))
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    made, wanted = _whole(place)
    other = next((n for n, t in wanted.items() if n not in state or state[n].shape != t.shape), None)
    if other is not None:
        raise UserError(
            f"the model must be that of {place}, an adopted {type(made).__name__}: it has no {other} of shape "
            f"{tuple(wanted[other].shape)}. Name the folder that training began with."
        )
    _save(made, wanted, state, place, target)


def _require_empty(out: PathLike) -> Path:
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} must be a new or empty folder. Choose another.")
    return target


def _whole(place: Path) -> tuple[Any, dict[str, Tensor]]:
    """The adopted model of a folder, whose weights are still to be filled, and those by name."""
    folder_files(place)
    model = on_meta(place, None)
    adopt(model, aux=None)
    compute_buffers(model)
    give_memory(model, torch.device("cpu"))
    return model, model_tensors(model)[0]


@torch.no_grad()
def _save(model: Any, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], place: Path, target: Path) -> None:
    merged = merged_state(state)
    for name, tensor in wanted.items():
        if merged[name] is not tensor:
            tensor.copy_(merged[name])
    changes = [f"Trained with moekit from {place.name}."]
    write_folder(model, target, like=place, relation="finetune", changes=changes)
