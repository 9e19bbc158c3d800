"""How fast a run computed, beside what its machine can do and what the planner's arithmetic says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit.runs.config import RunConfig
from moekit.runs.plan import expected
from moekit.runs.recipe import Recipe


def speed_of(recipe: Recipe, config: RunConfig, folder: Path, trained: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Step time, operations a second and their forecast, for summary.json; what nobody knows is None.

    Args:
        recipe: whose model was trained.
        config: the settings of training.
        folder: the run's; its environment.json has the machine's rate.
        trained: tokens and seconds of the whole training.
        steps: optimizer steps of it.

    Returns:
        ``step_seconds``; ``flops_per_token``, forward and backward by the planner's arithmetic for texts of the
        greatest length; ``flops_per_second``, the model's, of all processes; ``product_rate``, that of a large matrix
        product on each of them; ``share`` of it; and ``forecast_seconds``, training at that rate.
    """
    tokens, seconds = trained.get("tokens", 0), trained.get("seconds", 0.0)
    plan = expected(recipe, config)
    work = None if plan is None else plan.flops_per_token
    rate = product_rate_of(folder)
    full = None if rate is None else rate * config.train.devices * config.train.num_nodes
    done = work * tokens / seconds if work and tokens and seconds else None
    return {
        "step_seconds": seconds / steps if steps and seconds else None,
        "flops_per_token": work,
        "flops_per_second": done,
        "product_rate": rate,
        "share": done / full if done and full else None,
        "forecast_seconds": work * tokens / full if work and full and tokens else None,
    }


def product_rate_of(folder: Path) -> float | None:
    """The rate that a run's environment.json has; None where it has none."""
    try:
        rate = json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("product_rate")
    except (OSError, ValueError, AttributeError):
        return None
    return float(rate) if isinstance(rate, int | float) and rate > 0 else None
