"""What a recipe's model needs on a layout, by arithmetic; nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from moekit.errors import UserError
from moekit.planner import GIB, Forecast, Layout, Training, compare, fewest_devices, plan
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe, RunText
from moekit.runs.settings.tasks import active_tasks


def forecast(
    recipe: Recipe,
    variant: str,
    config: RunConfig,
    console: Console,
    *,
    memory: float | None = None,
    sequences: int = 8,
    length: int | None = None,
) -> None:
    """Print what the model needs on the layout of ``--devices``, ``--nodes`` and ``--strategy.*``.

    Args:
        recipe: whose model it is.
        variant: name above the numbers.
        config: the settings.
        console: where they are printed.
        memory: GiB of a device: say whether it fits, and where.
        sequences: their number in a micro-batch of a device.
        length: tokens of a sequence; None = ``data.max_length``.

    Raises:
        UserError: the layout does not fit the devices or the model, or the model is none that can be planned.
    """
    model, layout = _network(recipe, config), _layout(config)
    try:
        training = _training(config, sequences, length or config.data.max_length)
        made = plan(model, layout, training)
        console.print(compare({variant: made}), highlight=False, soft_wrap=True)
        if memory is not None:
            _judge(made, model, training, memory, console)
    except ValueError as error:
        raise UserError(f"plan: {error}") from None


def expected(recipe: Recipe, config: RunConfig) -> Forecast | None:
    """What a process of this run should need; None if the model is none that can be planned.

    The tokens of all tasks are taken for texts of the greatest length, and heads of their own are left out.
    """
    length = config.data.max_length
    tokens = sum(task.tokens for task in active_tasks(config.tasks).values())
    try:
        model = _network(recipe, config)
        sides = 2 if hasattr(model, "encoder") and hasattr(model, "decoder") else 1
        training = _training(config, max(1, -(-tokens // (sides * length))), length)
        return plan(model, _layout(config), training)
    except (ValueError, TypeError, NotImplementedError):
        return None


def _judge(made: Forecast, model: torch.nn.Module, training: Training, gib: float, console: Console) -> None:
    fits = made.fits(gib * GIB)
    console.print(
        f"{'fits' if fits else 'does not fit'} into {gib:g} GiB a device: {made.memory.device / GIB:.2f} GiB needed.",
        style="green" if fits else "bold red",
        highlight=False,
    )
    try:
        best = fewest_devices(model, replace(training, plain=False), gib * GIB)  # by the strategy
        answer = f"fewest devices of {gib:g} GiB: {best.layout} with {best.memory.device / GIB:.2f} GiB each."
    except ValueError as nowhere:  # an answer too
        answer = str(nowhere)
    console.print(answer, highlight=False, soft_wrap=True)


def _network(recipe: Recipe, config: RunConfig) -> torch.nn.Module:
    """The network without memory."""
    return recipe.parts(config, RunText(config.data.vocab_size), "meta").backbone


def _layout(config: RunConfig) -> Layout:
    """What the settings say; where they say nothing of it, every device holds everything, as in a plain run."""
    devices, given = config.train.devices * config.train.num_nodes, _given(config)
    if given.get("expert_parallel_size") == "auto":
        raise UserError("plan needs a number for strategy.expert_parallel_size: got auto.")
    if not given:
        return Layout(devices=devices, zero_stage=0)
    try:
        return Layout(devices=devices, **given)
    except ValueError as error:
        raise UserError(f"strategy: {error}") from None


def _given(config: RunConfig) -> dict[str, Any]:
    """What the settings say of the strategy."""
    names = ("expert_parallel_size", "tensor_parallel_size", "replicas", "zero_stage", "offload")
    return {name: value for name in names if (value := getattr(config.strategy, name)) is not None}


def _training(config: RunConfig, sequences: int, length: int) -> Training:
    return Training(
        sequences=sequences,
        source_length=length,
        target_length=length,
        accumulate=config.train.accumulate,
        precision=config.train.usable_precision,
        optimizer=config.train.optimizer,
        checkpointing=getattr(config.model, "checkpoint", False),
        plain=not _given(config),
    )
