"""What training the model of a folder needs on some devices, by its config.json and the headers of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.errors import UserError
from moekit.huggingface import adopt
from moekit.huggingface.folder import FolderWeights, folder_files, on_meta
from moekit.parallel.layout import Layout, Training
from moekit.planner import GIB, Forecast, compare
from moekit.planner.census import Census
from moekit.planner.forecast import forecast_of
from moekit.planner.transformers_models import census_of
from moekit.surgery import add_adapters

_SHOWN = 4  # layouts side by side


@dataclass(frozen=True)
class FolderPlan:
    """The best layouts of a model on some devices.

    Attributes:
        what: what is trained.
        parameters: those of the model, shared ones once.
        best: forecasts, the least traffic first; layouts than which another needs less memory and less traffic are
            left out.
        fitting: those of them that fit into the devices' memory; all where nobody said how much that is.
    """

    what: str
    parameters: int
    best: Sequence[Forecast]
    fitting: Sequence[Forecast]


def folder_plan(
    folder: Path,
    devices: int,
    training: Training,
    *,
    memory: float | None = None,
    rank: int = 0,
    targets: Sequence[str] = ("experts",),
) -> FolderPlan:
    """Plan the training of a folder's model; no weights are read.

    Args:
        folder: one of transformers, of an architecture that is adopted.
        devices: their number.
        training: micro-batch, precision, optimizer, checkpointing.
        memory: bytes of a device; None = not known.
        rank: that of adapters, all else being frozen; 0 = everything is trained.
        targets: what has adapters, as `moekit.surgery.add_adapters` takes it.

    Raises:
        UserError: the folder is broken or of another model, or no layout divides it.
    """
    files = folder_files(folder)
    model = on_meta(folder, None)
    adopt(model, aux=None)
    FolderWeights(folder, model, files)  # refuses headers that are not of this model
    counted = sum(parameter.numel() for parameter in model.parameters())
    if rank:
        model.requires_grad_(False)
        chosen: Any = tuple(targets)
        try:
            adapters = add_adapters(model, rank=rank, targets=chosen)
        except ValueError as error:
            raise UserError(f"--targets: {error}") from None
        for name in adapters:
            model.get_parameter(name).requires_grad_(True)
    found = _layouts(census_of(model, training), devices, training)
    what = f"adapters of rank {rank} on {', '.join(targets)}" if rank else "full fine-tuning"
    best = _undominated(found)
    fitting = [made for made in best if memory is None or made.fits(memory)]
    return FolderPlan(what, counted, best, fitting)


def show_plan(found: FolderPlan, memory: float | None) -> str:
    """The plan as text: a table of the best layouts, and whether they fit."""
    shown = list(found.fitting or found.best[-1:])[:_SHOWN]
    table = compare({f"layout {number}": made for number, made in enumerate(shown, 1)})
    lines = [f"{found.what}:", table]
    if memory is not None and not found.fitting:
        least = found.best[-1].memory.device / GIB
        lines.append(
            f"no layout fits into {memory / GIB:g} GiB a device: {least:.2f} GiB needed at least. Use more devices, "
            "--checkpointing, fewer --sequences, or --adapters."
        )
    elif memory is not None:
        lines.append(f"fits into {memory / GIB:g} GiB a device: {len(found.fitting)} of {len(found.best)} layouts.")
    return "\n".join(lines)


def _layouts(census: Census, devices: int, training: Training) -> list[Forecast]:
    experts = census.fewest_experts or 1
    found: list[Forecast] = []
    trouble: Exception | None = None
    for size in (n for n in range(1, experts + 1) if experts % n == 0 and devices % n == 0):
        for stage in (0, 1, 2, 3) if devices > 1 else (0,):
            layout: Any = {"devices": devices, "expert_parallel_size": size, "zero_stage": stage}
            try:
                found.append(forecast_of(census, Layout(**layout), training))
            except UserError as error:
                trouble = trouble or error
    if not found:
        raise trouble or UserError(f"no layout of {devices} devices divides {census.name}.")
    return found


def _undominated(found: Sequence[Forecast]) -> list[Forecast]:
    """Those than which none needs less of memory or traffic and no more of the other; the least traffic first."""
    kept: list[Forecast] = []
    for made in sorted(found, key=lambda one: (one.traffic.total, one.memory.device)):
        if not kept or made.memory.device < kept[-1].memory.device:
            kept.append(made)
    return kept
