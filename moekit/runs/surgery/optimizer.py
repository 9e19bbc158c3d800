"""The optimizer state of a run by the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.runs.config import RunConfig
from moekit.runs.run import Run
from moekit.surgery import parameter_names, state_by_name
from moekit.training.callbacks.config import CONFIG_KEY


def optimizer_names(run: Run, config: RunConfig | None = None) -> list[str]:
    """Names of parameters in the order of the run's optimizer, or of that of another configuration."""
    model = run.model(config)
    return parameter_names(model, (config or run.config).train.make_optimizer(model))


def optimizer_slots(run: Run) -> dict[str, dict[str, Any]] | None:
    """Optimizer state by parameter names; None where the checkpoint has none, or is of a run of fine-tuning.

    Raises:
        UserError: if it is not that of the recipe's optimizer.
    """
    loaded = run.loaded
    settings = loaded.rest.get(CONFIG_KEY)
    if isinstance(settings, Mapping) and "fine_tune" in settings:
        return None  # fine-tuning steps other parameters than the recipe
    if loaded.named_optimizer is not None:
        return loaded.named_optimizer
    if loaded.optimizer is None:
        return None
    return state_by_name(loaded.optimizer, optimizer_names(run), str(run.checkpoint))
