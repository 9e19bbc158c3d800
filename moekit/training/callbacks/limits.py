"""A limit of wall-clock time that a stop and a resume do not reset."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from moekit.training.agreement import agree
from moekit.training.budget import Budget


class MaxMinutes(Callback):
    """Ends training when the minutes of `budget` are used up, and keeps `budget.seconds` for schedules.

    Time runs from the first batch to the last, validation and checkpoints in between included. The time used is kept
    in checkpoints, and a resumed run has what is left. At the end the optimizer step under way is finished, Lightning
    validates once more and stops in order. Without `max_minutes` the callback only measures. With several processes the
    first one's clock counts; it tells the others by way of host memory, so that nobody waits for a GPU.

    Args:
        budget: shared with the learning rate schedule where that depends on time.
        clock: seconds that never go back; for tests.
    """

    def __init__(self, budget: Budget, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self._clock = clock
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._clock() - self.budget.seconds
        if self.budget.out_of_time:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        seconds = self._clock() - self._start
        if self.budget.max_minutes is not None:  # else nobody decides by it
            (seconds,) = agree(trainer, seconds if trainer.is_global_zero else 0.0)
        self.budget.seconds = seconds
        # Gradients of micro-batches whose step is not taken would be lost.
        if self.budget.out_of_time and not trainer.fit_loop._should_accumulate():
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.budget.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.budget.seconds = state_dict["seconds"]
