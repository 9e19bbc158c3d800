"""What a recipe's model needs on a layout, by arithmetic; nothing is trained."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from moekit.errors import UserError
from moekit.planner import GIB, Forecast, Layout, Training, compare, fewest_devices, plan
from moekit.recipes._config import StrategyConfig, TrainConfig, active_tasks
from moekit.recipes._machine import usable_precision
from moekit.recipes._parts import Build, build_parts


def options(parser: ArgumentParser) -> None:
    """The options of ``plan``."""
    parser.add_argument("--memory", type=float, default=None, help="GiB of a device: say whether it fits, and where")
    parser.add_argument("--sequences", type=int, default=8, help="in a micro-batch of a device")
    parser.add_argument("--length", type=int, default=None, help="tokens of a sequence (default: data.max_length)")


def forecast(build: Build, config: Any, given: Namespace, console: Console) -> None:
    """Print what the model needs on the layout of ``--devices``, ``--nodes`` and ``--strategy.*``.

    Raises:
        UserError: the layout does not fit the devices or the model, or the model is none that can be planned.
    """
    model = _network(build, config)
    layout, training = _layout(config), _training(config, given)
    try:
        made = plan(model, layout, training)
        console.print(compare({given.variant: made}), highlight=False, soft_wrap=True)
        if given.memory is not None:
            _judge(made, model, training, given.memory, console)
    except ValueError as error:
        raise UserError(f"plan: {error}") from None


def expected_bytes(build: Build, config: Any) -> float | None:
    """What a process of this run should need at its fullest, in bytes; None if the model is none that can be planned.

    The tokens of all tasks are taken for texts of the greatest length. Under offload it is the device's part alone.
    """
    train, length = config.train, config.data.max_length
    tokens = sum(task.tokens for task in active_tasks(config.tasks).values())
    try:
        model = _network(build, config)
        sides = 2 if hasattr(model, "encoder") and hasattr(model, "decoder") else 1
        training = Training(
            sequences=max(1, -(-tokens // (sides * length))),
            source_length=length,
            target_length=length,
            accumulate=train.accumulate,
            precision=usable_precision(train),
            optimizer=train.optimizer,
            checkpointing=getattr(config.model, "checkpoint", False),
        )
        return float(plan(model, _layout(config), training).memory.device)
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
        best = fewest_devices(model, training, gib * GIB)
        answer = f"fewest devices of {gib:g} GiB: {best.layout} with {best.memory.device / GIB:.2f} GiB each."
    except ValueError as nowhere:  # an answer too
        answer = str(nowhere)
    console.print(answer, highlight=False, soft_wrap=True)


def _network(build: Build, config: Any) -> torch.nn.Module:
    """The network without memory."""
    with torch.device("meta"):
        return build_parts(build, config, config.data.vocab_size, None).backbone


def _layout(config: Any) -> Layout:
    """What the settings say; where they say nothing of it, every device holds everything, as in a plain run."""
    settings: StrategyConfig = config.strategy
    train: TrainConfig = config.train
    devices = train.devices * train.num_nodes
    given = {
        name: value
        for name in ("expert_parallel_size", "tensor_parallel_size", "replicas", "zero_stage", "offload")
        if (value := getattr(settings, name)) is not None
    }
    if given.get("expert_parallel_size") == "auto":
        raise UserError("plan needs a number for strategy.expert_parallel_size: got auto.")
    if not given:
        return Layout(devices=devices, zero_stage=0)
    try:
        return Layout(devices=devices, **given)
    except ValueError as error:
        raise UserError(f"strategy: {error}") from None


def _training(config: Any, given: Namespace) -> Training:
    train: TrainConfig = config.train
    length = given.length or config.data.max_length
    try:
        return Training(
            sequences=given.sequences,
            source_length=length,
            target_length=length,
            accumulate=train.accumulate,
            precision=usable_precision(train),
            checkpointing=getattr(config.model, "checkpoint", False),
        )
    except ValueError as error:
        raise UserError(f"plan: {error}") from None
