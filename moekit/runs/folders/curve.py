"""Quality against size of a folder's model: fewer and fewer experts, chosen in several ways, and the loss each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from moekit.huggingface import adopt_folder, choose_kept, prune
from moekit.runs.folders.measuring import held_out_loss, measured_use
from moekit.runs.folders.text import TextChoice, folder_text
from moekit.runs.surgery.curve import LABELS, Curve, Point
from moekit.surgery.pruning import Order


def folder_curve(
    folder: Path,
    keep: Sequence[int | float],
    choice: TextChoice,
    *,
    draws: int = 5,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,
) -> Curve:
    """The held-out loss of a folder's model with its experts pruned by use, by REAP, and at random.

    Experts are chosen on the training text, and the loss is of the validation text.

    Args:
        folder: one of transformers, of an architecture that is adopted.
        keep: shares or numbers of experts.
        choice: the text.
        draws: random choices for each of them.
        seed: seed of the first draw; the others have the numbers after it.
        advance: told what has been evaluated.

    Raises:
        UserError: see `moekit.huggingface.choose_kept` and `folder_text`.
    """
    calibration, held_out = folder_text(folder, choice, "train"), folder_text(folder, choice, "valid")
    model = adopt_folder(folder, aux=None)
    for share in keep:  # before anything is measured
        choose_kept(model, share, "random")
    use = measured_use(model, calibration)
    scores: Mapping[Order, Mapping[str, Tensor]] = {
        "utilisation": {path: one.load for path, one in use.items()},
        "reap": {path: one.saliency for path, one in use.items()},
        "random": {},
    }
    arms: list[tuple[int | float, Order, int | None]] = []
    for share in keep:
        arms += [(share, "utilisation", None), (share, "reap", None)]
        arms += [(share, "random", seed + draw) for draw in range(draws)]

    def point(share: int | float, order: Order, number: int | None, kept: Mapping[str, Tensor] | None) -> Point:
        made = model if kept is None else prune(model, kept)
        found = Point(
            keep=share,
            order=order,
            seed=number,
            experts={path: experts.tolist() for path, experts in (kept or {}).items()},
            parameters=sum(parameter.numel() for parameter in made.parameters()),
            loss=held_out_loss(made, held_out),
        )
        advance(f"{share:g} {LABELS[order]}")
        return found

    whole = point(1.0, "utilisation", None, None)
    points = [
        point(*arm, choose_kept(model, arm[0], arm[1], load=scores[arm[1]] or None, seed=arm[2] or 0)) for arm in arms
    ]
    return Curve(str(folder), held_out.predicted, whole, points, None, held_out.said)
