"""How training ended: at the end of its schedule, or before it, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moekit.runs.record import Ending
from moekit.runs.settings.train import TrainConfig


def ending_of(train: TrainConfig, checkpoint: Mapping[str, Any]) -> Ending | None:
    """What the last checkpoint says of it; None where nothing was trained.

    Args:
        train: the settings of the run.
        checkpoint: what it holds beside weights and optimizer.
    """
    steps = int(checkpoint.get("global_step", 0))
    if not steps:
        return None
    callbacks = checkpoint.get("callbacks", {})
    seconds = float(callbacks.get("MaxMinutes", {}).get("seconds", 0.0))
    signal = callbacks.get("Resumable", {}).get("signal")
    max_steps, max_minutes = train.max_steps or None, train.max_minutes or None
    if max_steps is not None and steps >= max_steps:
        by = "steps"
    elif max_minutes is not None and seconds >= 60 * max_minutes:
        by = "minutes" if max_steps is None else "clock"
    else:
        by = "stopped" if signal is None else "interrupted"
    budget = train.budget()
    budget.seconds = seconds
    done = min(1.0, steps / max_steps) if max_steps else budget.fraction(steps)  # the schedule follows steps, if any
    rates: list[float | None] = [None, None]
    if states := checkpoint.get("lr_schedulers"):
        schedule: Any = train.make_schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), budget)
        schedule.load_state_dict(states[0])
        rates[0] = schedule.factor(steps - 1)
        budget.seconds = 60 * (max_minutes or 0.0)
        rates[1] = schedule.factor((max_steps or steps) - 1)
    return Ending(
        by=by,
        signal=signal if by == "interrupted" else None,
        steps=steps,
        minutes=seconds / 60,
        max_steps=max_steps,
        max_minutes=max_minutes,
        done=done,
        learning_rate=rates[0],
        rising=steps < train.warmup_steps,
        last_learning_rate=rates[1],
    )
