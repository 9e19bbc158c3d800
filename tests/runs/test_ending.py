"""How training ended, from what its last checkpoint holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moekit.runs.ending import ending_of
from moekit.runs.record import Ending, Summary
from moekit.runs.settings.train import TrainConfig

COSINE = TrainConfig(max_steps=1000, max_minutes=2.0, warmup_steps=100)


def checkpoint(steps: int, minutes: float, signal: str | None = None, **schedule: Any) -> dict[str, Any]:
    state = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": [0.0], **schedule}
    callbacks = {"MaxMinutes": {"seconds": 60 * minutes}, "Resumable": {"signal": signal}}
    return {"global_step": steps, "callbacks": callbacks, "lr_schedulers": [state]}


@pytest.mark.parametrize(
    ("steps", "minutes", "signal", "by", "done"),
    [
        (1000, 1.0, None, "steps", 1.0),
        (1000, 2.5, "SIGTERM", "steps", 1.0),
        (550, 2.0, None, "clock", 0.55),
        (550, 1.9, "SIGINT", "interrupted", 0.55),
        (550, 1.9, None, "stopped", 0.55),
    ],
)
def test_what_ended_it(steps: int, minutes: float, signal: str | None, by: str, done: float) -> None:
    end = ending_of(COSINE, checkpoint(steps, minutes, signal))
    assert end is not None
    assert (end.by, end.done, end.steps, end.max_steps, end.max_minutes) == (by, done, steps, 1000, 2.0)
    assert end.signal == (signal if by == "interrupted" else None)
    used = (steps - 1 - 100) / 900
    assert end.learning_rate == pytest.approx(0.05 + 0.95 * (1 + math.cos(math.pi * used)) / 2)
    assert end.last_learning_rate == pytest.approx(0.05, abs=1e-4)
    assert not end.rising
    assert Summary.from_json(Summary(ending=end).to_json()).ending == end


def test_a_run_by_minutes_ends_with_them() -> None:
    train = COSINE.__class__(max_steps=0, max_minutes=2.0, warmup_steps=10)
    whole = ending_of(train, checkpoint(700, 2.0, _warmup_fraction=0.1))
    half = ending_of(train, checkpoint(300, 1.1, "SIGTERM", _warmup_fraction=0.1))
    assert whole is not None
    assert half is not None
    assert (whole.by, whole.done, whole.max_steps) == ("minutes", 1.0, None)
    assert whole.learning_rate == pytest.approx(0.05)
    assert (half.by, half.done) == ("interrupted", pytest.approx(0.55))
    assert half.learning_rate == pytest.approx(0.05 + 0.95 / 2)  # half of what the warm-up left
    assert half.last_learning_rate == pytest.approx(0.05)


def test_a_warm_up_that_was_not_over_and_a_rate_that_stays() -> None:
    early = ending_of(COSINE, checkpoint(50, 2.0))
    flat = ending_of(TrainConfig(max_steps=1000, warmup_steps=100, schedule="constant"), checkpoint(500, 9.0))
    assert early is not None
    assert flat is not None
    assert early.rising
    assert early.learning_rate == 0.5
    assert (flat.learning_rate, flat.last_learning_rate, flat.max_minutes) == (1.0, 1.0, None)


def test_an_old_checkpoint_and_one_that_was_never_trained() -> None:
    assert ending_of(COSINE, {"global_step": 0}) is None
    assert ending_of(COSINE, {}) is None
    assert ending_of(COSINE, {"global_step": 10}) == Ending(
        by="stopped", steps=10, max_steps=1000, max_minutes=2.0, done=0.01, rising=True
    )
