"""Callbacks of several processes agree through host memory: nobody is asked over the training's process group."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from small_lm import SmallLM, quiet, sentences, trainer_for
from torch.utils.data import DataLoader

from moekit import ExpertParallelStrategy
from moekit.testing import run_distributed
from moekit.training.agreement import agree
from moekit.training.budget import Budget
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.callbacks.interrupt import Resumable
from moekit.training.callbacks.limits import MaxMinutes
from moekit.training.checkpoint_state import load_rest


class Clock:
    """Seconds of a rank: those of rank 1 pass faster."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Ticks(L.Callback):
    """Turns the clocks; and rank 1 gets a signal in some step."""

    def __init__(self, clock: Clock, resumable: Resumable | None = None, signal_in: int = -1) -> None:
        self.clock, self.resumable, self.signal_in = clock, resumable, signal_in

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.clock.now += 10.0 * (1 + 5 * dist.get_rank())
        if self.resumable is not None and dist.get_rank() == 1 and batch_idx == self.signal_in:
            self.resumable._handle(15, None)


class Silent(ExpertParallelStrategy):
    """Lets nobody ask over the training's group while batches are trained."""

    training = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.training = True

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        assert not self.training, "a pickled broadcast"
        return super().broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        assert not self.training, "a decision over the training's group"
        return super().reduce_boolean_decision(decision, all)


def ends(room: str) -> dict[str, Any]:
    loader: Any = DataLoader(sentences(6), batch_size=4)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    clock = Clock()
    limit = MaxMinutes(Budget(max_minutes=0.5), clock=clock)
    trainer = trainer_for(Silent(2), callbacks=[Ticks(clock), limit], use_distributed_sampler=False, max_epochs=9)
    trainer.fit(SmallLM("sgd"), loader)
    found["minutes"] = (trainer.global_step, limit.budget.seconds)

    trainer.strategy.training = False
    found["agreed"] = agree(trainer, dist.get_rank(), dist.get_rank() == 0, 2.5)

    clock = Clock()
    saved: list[int] = []
    resumable = Resumable(Path(room), every_n_minutes=0.5, clock=clock)
    resumable._save = lambda trainer: saved.append(trainer.global_step)  # type: ignore[method-assign]
    callbacks = [Ticks(clock, resumable, 7), resumable]
    trainer = trainer_for(
        Silent(2, timeout=timedelta(seconds=60)), callbacks=callbacks, use_distributed_sampler=False,
        enable_checkpointing=True,
    )  # fmt: skip
    original, resumable._saved_time = resumable._save, 0.0

    def save(trainer: Any) -> None:
        original(trainer)
        resumable._saved_step, resumable._saved_time = trainer.global_step, clock()

    resumable._save = save  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        trainer.fit(SmallLM("sgd"), loader)
    found["saved"], found["code"] = saved, ended.value.code
    return found


class Judged(SmallLM):
    """Says another value on each rank, or one on the first alone: the first rank's gets better, the other's worse."""

    def __init__(self, *, first_alone: bool) -> None:
        super().__init__("sgd")
        self.first_alone = first_alone

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = float(self.trainer.current_epoch)
        self.log("valid", value if dist.get_rank() else -value, rank_zero_only=self.first_alone)


def best_of_several(room: str) -> dict[str, Any]:
    loader: Any = DataLoader(sentences(1), batch_size=4)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    with quiet():
        for first_alone in (False, True):
            best = BestCheckpoint(Path(room) / str(first_alone), monitor="valid")
            trainer = trainer_for(
                ExpertParallelStrategy(2), callbacks=[best], enable_checkpointing=True, max_epochs=3,
                limit_val_batches=1, num_sanity_val_steps=0, use_distributed_sampler=False,
            )  # fmt: skip
            trainer.fit(Judged(first_alone=first_alone), loader, loader)
            found[str(first_alone)] = best.best, load_rest(best.path)["global_step"] // len(loader)
    return found


def test_the_first_value_says_what_is_best(tmp_path: Path) -> None:
    """All ranks save together, after each of three epochs."""
    for found in run_distributed(best_of_several, 2, str(tmp_path)):
        assert found == {"False": (-2.0, 3), "True": (-2.0, 3)}


def quietly(room: str) -> dict[str, Any]:
    with quiet():
        return ends(room)


def test_the_first_clock_counts_and_any_signal_stops(tmp_path: Path) -> None:
    """Thirty seconds by the first rank's clock are three steps; a signal of the second stops both in the eighth."""
    torch.manual_seed(0)
    first, second = run_distributed(quietly, 2, str(tmp_path))
    assert first == second
    assert first["minutes"] == (3, 30.0)
    assert first["agreed"] == [1.0, 1.0, 2.5]
    assert first["saved"] == [3, 6, 8]
    assert first["code"] == 143
