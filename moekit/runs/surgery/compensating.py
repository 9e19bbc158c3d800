"""Experts that are there several times, in runs: the setting that choices are, the record, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moekit.errors import UserError
from moekit.routing import Compensation
from moekit.runs.config import RunConfig
from moekit.runs.plain import with_setting
from moekit.runs.run import SURGERY_FILE, Run
from moekit.stored import parse_json
from moekit.surgery import SparseLayer, compensations, sparse_layers

COPIES = "compensated_copies"
"""Key of the record: how many times each expert is there, as far as outputs and choices make up for it."""


def copies_of(run: Run) -> float:
    """What a run's `surgery.json` says of its experts; 1 where they are themselves.

    Raises:
        UserError: the file is damaged.
    """
    file = run.path / SURGERY_FILE
    if not file.is_file():
        return 1.0
    try:
        return float(parse_json(file.read_text(encoding="utf-8")).get(COPIES, 1.0))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} must be what moekit.surgery wrote: {error}. Restore it, or remove it.") from None


def needs(layers: Mapping[str, SparseLayer], copies: float, state: Mapping[str, Tensor]) -> dict[str, Compensation]:
    """`moekit.surgery.compensations`; nothing for one copy, whatever the router."""
    return dict.fromkeys(layers, Compensation()) if copies == 1 else compensations(layers, copies, state)


def with_choices(
    run: Run, config: RunConfig, layers: Mapping[str, SparseLayer], needed: Mapping[str, Compensation]
) -> RunConfig:
    """The configuration with as many choices of a token as its layers need.

    Raises:
        UserError: the recipe has no setting for them.
    """
    factors = {n.choices for path, n in needed.items() if layers[path].router and n.choices != 1}
    if not factors:
        return config
    k = getattr(config.model, "k", None)
    if k is None or len(factors) != 1:
        raise UserError(
            f"the function of {run.path} is kept only if a token chooses {max(factors):g} times as many experts, "
            f"and the recipe {run.recipe.name} has no setting for that (model.k). With --plain choices stay as "
            "they are, and the function does not."
        )
    factor = factors.pop()
    if getattr(config.model, "capacity_share", "choices") == "tokens":
        # As many slots of an expert as before: these factors count tokens and experts, and no choices.
        for name in ("capacity_factor", "eval_capacity_factor"):
            config = with_setting(config, f"model.{name}", getattr(config.model, name) * factor)
    return with_setting(config, "model.k", max(1, int(k * factor + 0.5)))


def wanted_choices(layer: SparseLayer, needed: Compensation) -> float:
    """How many experts a token must choose in a layer whose copies are made up for."""
    return max(1, int(layer.k * needed.choices + 0.5)) if needed.choices != 1 else layer.k


def require_choices(
    run: Run, target: nn.Module, layers: Mapping[str, SparseLayer], needed: Mapping[str, Compensation]
) -> None:
    """Raise UserError if layers of the new model do not choose as many experts as they need."""
    found = sparse_layers(target)
    for path, layer in layers.items():
        wanted = wanted_choices(layer, needed[path])
        if layer.router and found[path].k != wanted:
            raise UserError(
                f"{path} must choose {wanted:g} experts for the function of {run.path} to be kept: the recipe "
                f"{run.recipe.name} builds it with {found[path].k:g}. With --plain choices stay as they are."
            )


def describe(layers: Mapping[str, SparseLayer], needed: Mapping[str, Compensation]) -> str:
    """What was done about copies, in a line; nothing where nothing was needed."""
    scales = sorted({n.scale for n in needed.values() if n.scale != 1})
    choices = sorted({(layers[path].k, layers[path].k * n.choices) for path, n in needed.items() if n.choices != 1})
    parts = [f"experts' outputs times {', '.join(f'{scale:g}' for scale in scales)}"] if scales else []
    parts += [f"a token chooses {int(new + 0.5)} experts instead of {old:g}" for old, new in choices]
    return f"compensated  {', '.join(parts)} (--plain leaves it out)" if parts else ""


def noted(record: Mapping[str, Any], copies: float, needed: Mapping[str, Compensation]) -> dict[str, Any]:
    """The record with what later operations must know."""
    if copies == 1 and all(n.scale == n.choices == 1 for n in needed.values()):
        return dict(record)
    return {**record, COPIES: copies, "compensation": {path: dataclasses.asdict(n) for path, n in needed.items()}}
