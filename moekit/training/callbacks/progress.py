"""How far the run is: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moekit.terminal import Terminal
from moekit.training.budget import Budget
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.callbacks.routing_monitor import RoutingMonitor

_SPEED_IS_KNOWN = 30.0  # seconds
_FEW_STEPS = 5
_MARGIN = 1.1  # validations and checkpoints take time, too


class TrainingProgress(ProgressBar):
    """Shows step, loss, tokens per second, time used and time left of training, and batches of evaluation.

    On a terminal it is a bar; elsewhere (a file, a CI log) a plain line every `line_seconds`, at the start of each
    evaluation, and at the end.

    Where minutes end the run it says once how far they will reach, as soon as the speed is known.

    Args:
        budget: what the run may use; without it the Trainer's ``max_steps`` or ``max_epochs`` tell the end.
        line_seconds: time between lines where there is no terminal.
        console: where to write; default standard error.
        clock: seconds that never go back; for tests.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        line_seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.budget = budget
        self.line_seconds = line_seconds
        self._console = console or Terminal(stderr=True)
        self._clock = clock
        self._enabled = True
        self._bar: Progress | None = None
        self._shown = -math.inf
        self._start = self._start_fraction = 0.0
        self._timed: tuple[float, int] | None = None  # time and step from which the speed is measured
        self._foretold = False

    def disable(self) -> None:
        self._enabled = False  # Lightning calls it in all processes but the first
        self._close()

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._clock()
        self._start_fraction = self._fraction(trainer)
        self._timed, self._foretold = None, False
        self._open("train")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._show(lambda: self.training_text(trainer), lambda: self._fraction(trainer))
        if not self._foretold and self._enabled and self.budget is not None and self.budget.max_minutes is not None:
            self._foretell(trainer, self.budget, 60 * self.budget.max_minutes)

    def _foretell(self, trainer: L.Trainer, budget: Budget, limit: float) -> None:
        """Say once how far the minutes will reach, when the speed is known: in the first minute, or a tenth of them.

        The first step is not counted: it pays for what is done once.
        """
        now, step = self._clock(), trainer.global_step
        if self._timed is None:
            self._timed = (now, step) if step else None
            return
        seconds, steps = now - self._timed[0], step - self._timed[1]
        if seconds < min(_SPEED_IS_KNOWN, limit / 10) or steps < _FEW_STEPS:
            return
        self._foretold = True
        reached = round(step + max(0.0, limit - budget.seconds) * steps / seconds)
        if budget.max_steps is None:
            said = f"At this speed {budget.max_minutes:g} minutes are about {reached:,} steps."
        elif reached >= budget.max_steps:
            return
        else:
            minutes = math.ceil((budget.seconds + (budget.max_steps - step) * seconds / steps) * _MARGIN / 60)
            said = (
                f"At this speed train.max_minutes={budget.max_minutes:g} ends the run at about step {reached:,} of "
                f"{budget.max_steps:,}: {100 * reached / budget.max_steps:.0f} % of its schedule. All of it takes "
                f"about {minutes} minutes."
            )
        self.say(said)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(lambda: self.training_text(trainer), lambda: 1.0, force=True)
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":  # else it is inside training, which goes on being shown
            self._open("test" if trainer.testing else "valid")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        batches: Any = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        done, total = sum(batches[:dataloader_idx]) + batch_idx + 1, sum(batches)
        text = f"{'testing' if trainer.testing else 'validating'} {done:,.0f}"
        text += f"/{total:,.0f}" if math.isfinite(total) else ""
        self._show(lambda: text, lambda: done / total if math.isfinite(total) and total else 0.0)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._close()

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def training_text(self, trainer: L.Trainer) -> str:
        """For example ``step 120/2000  loss 5.123  8,400 tokens/s  1:02 used  16:02 left``, and what callbacks add."""
        metrics = trainer.callback_metrics
        limit = self._max_steps(trainer)
        parts = [f"step {trainer.global_step:,}" + (f"/{limit:,}" if limit else "")]
        for name in ("train/loss", "loss"):
            if name in metrics:
                parts.append(f"loss {float(metrics[name]):.3f}")
                break
        if "train/tokens_per_second" in metrics:
            parts.append(f"{float(metrics['train/tokens_per_second']):,.0f} tokens/s")
        minutes = self.budget.max_minutes if self.budget is not None else None
        used = self.budget.seconds if self.budget is not None and minutes else self._clock() - self._start
        parts.append(f"{_duration(used)}{'/' + _duration(60 * minutes) if minutes else ''} used")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        parts += [callback.text() for callback in callbacks if isinstance(callback, PeakMemory) and callback.bytes]
        parts += [text for callback in callbacks if isinstance(callback, RoutingMonitor) and (text := callback.text())]
        done = self._fraction(trainer)
        if (made := done - self._start_fraction) > 0:
            parts.append(f"{_duration((self._clock() - self._start) * (1 - done) / made)} left")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        """A line that somebody should read, above the bar."""
        if self._enabled:
            self._console.print(text, style="yellow", soft_wrap=True)

    def _max_steps(self, trainer: L.Trainer) -> int | None:
        if self.budget is not None and self.budget.max_steps is not None:
            return self.budget.max_steps
        return trainer.max_steps if trainer.max_steps > 0 else None

    def _fraction(self, trainer: L.Trainer) -> float:
        """Part of the run that is done; 0 where nobody knows."""
        if self.budget is not None:
            return self.budget.fraction(trainer.global_step)
        limit = self._max_steps(trainer)
        if limit is None and trainer.max_epochs and trainer.max_epochs > 0:
            batches = trainer.num_training_batches / trainer.accumulate_grad_batches
            limit = math.ceil(batches) * trainer.max_epochs if math.isfinite(batches) else None
        return min(1.0, trainer.global_step / limit) if limit else 0.0

    def _open(self, name: str) -> None:
        self._shown = -math.inf
        if self._enabled and self._console.is_terminal and self._bar is None:
            columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console, transient=False, auto_refresh=False)
            self._bar.start()
            self._bar.add_task(name, total=1.0)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, text: Callable[[], str], fraction: Callable[[], float], *, force: bool = False) -> None:
        """Write if it is time; texts are made only then, since reading metrics has a price."""
        now = self._clock()
        if not self._enabled or (now - self._shown < (0.25 if self._bar else self.line_seconds) and not force):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=text(), completed=fraction())
            self._bar.refresh()
        else:
            self._console.print(text(), soft_wrap=True)


def _duration(seconds: float) -> str:
    """``1:02`` or ``1:00:02``."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text
