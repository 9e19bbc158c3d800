"""Runs that can be stopped at any moment and resumed: `last.ckpt`, periodically, at a signal and at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moekit.terminal import visible
from moekit.training.agreement import agree
from moekit.training.callbacks.best import BestCheckpoint
from moekit.training.loggers import CsvLogger
from moekit.training.processes import is_first_process

_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Resumable(Checkpoint):
    """Keeps ``last.ckpt`` so that the run can be resumed, and ends it in order on SIGTERM, SIGINT and SIGHUP.

    A signal lets the optimizer step under way come to its end (a validation that is due as well), writes
    ``last.ckpt``, says how to resume, and exits with 128 + the signal's number (143 for SIGTERM, 130 for Ctrl-C, 129
    where the terminal is gone). A SIGHUP that ``nohup`` holds off is held off here too. Ctrl-C is answered with a line;
    a second one stops at once. Two that come while one product runs are one to Python, which is why there is the line.
    A checkpoint is only ever taken between optimizer steps, so that no accumulated gradient is lost, and after a
    validation that is due, so that a resumed run does not miss it. It needs
    `AtomicCheckpointIO` for a kill in the middle of a save to leave the former checkpoint whole.

    Args:
        folder: where ``last.ckpt`` goes.
        every_n_steps: optimizer steps between checkpoints; None = not by steps.
        every_n_minutes: minutes between checkpoints; None = not by time.
        how_to_resume: a command for the user; part of the message after a signal.
        clock: seconds that never go back; for tests.

    Raises:
        ValueError: an interval that is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 10.0,
        how_to_resume: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"Resumable.{name} must be positive or None: got {value}.")
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.how_to_resume = how_to_resume
        self._clock = clock
        self._signal: int | None = None
        self._former: dict[int, Any] = {}
        self._saved_step = self._seen_step = 0
        self._saved_time = 0.0
        self._put_off = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise ValueError if a `BestCheckpoint` comes later: last.ckpt must hold what it knows."""
        later = trainer.callbacks[trainer.callbacks.index(self) :]  # type: ignore[attr-defined]
        if any(isinstance(callback, BestCheckpoint) for callback in later):
            raise ValueError("callbacks must have BestCheckpoint before Resumable: got the reverse. Exchange them.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A signal that came before the first batch is Lightning's flag; it would stop between two optimizer steps.
        self._signal, self._put_off = (signal.SIGTERM if trainer.received_sigterm else None), False
        trainer._signal_connector.received_sigterm = False
        self._saved_step = self._seen_step = trainer.global_step
        self._saved_time = self._clock()
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.continue_from(trainer.global_step)  # drops rows that this run will write again
        for number in _SIGNALS:
            if number not in (signal.SIGTERM, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
                continue  # of nohup
            try:
                self._former[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: signals are somebody else's business
                return

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        stop, due = self._agree(trainer, due=trainer.is_global_zero and self._is_due(trainer))
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if (stop or due) and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._put_off = True  # saved now, a resumed run would leave this validation out
        elif stop or due:
            _log_this_step(trainer)
            self._save_and_perhaps_stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._put_off and not trainer.sanity_checking:
            self._put_off = False
            self._save_and_perhaps_stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved_step or not self.path.exists():
            self._save(trainer)
        if self._agree(trainer)[0]:  # a signal that came in the last step still stops what would follow
            raise SIGTERMException
        self._restore_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_signals()
        if isinstance(exception, SIGTERMException) and self._signal is not None:
            exception.code = 128 + self._signal
            if trainer.is_global_zero:
                stopped = f"Stopped by {signal.Signals(self._signal).name} after step {trainer.global_step}"
                resume = f" Resume with: {self.how_to_resume}" if self.how_to_resume else ""
                with contextlib.suppress(OSError):  # the terminal may be gone
                    print(visible(f"{stopped}; everything is in {self.path}.{resume}"), file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The signal that stops the run behind this checkpoint, by its name; None = none came."""
        return {"signal": None if self._signal is None else signal.Signals(self._signal).name}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_signals()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            self._restore_signals()
            raise KeyboardInterrupt
        self._signal = number
        if number == signal.SIGINT and is_first_process():
            _answer("Ctrl-C: the step under way is finished and saved. Press it again to stop at once.")

    def _restore_signals(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _agree(self, trainer: L.Trainer, *, due: bool = False) -> tuple[bool, bool]:
        """Whether any process got a signal, which then is everybody's, and whether for any it is time to save."""
        stop, save = agree(trainer, self._signal is not None, due)
        if stop:
            self._signal = self._signal or signal.SIGTERM
        return bool(stop), bool(save)

    def _is_due(self, trainer: L.Trainer) -> bool:
        by_steps = self.every_n_steps is not None and (trainer.global_step - self._saved_step >= self.every_n_steps)
        by_time = self.every_n_minutes is not None and (self._clock() - self._saved_time >= 60 * self.every_n_minutes)
        return by_steps or by_time

    def _save_and_perhaps_stop(self, trainer: L.Trainer) -> None:
        self._save(trainer)
        if self._agree(trainer)[0]:
            # Lightning raises SIGTERMException when this batch is wholly accounted for and its values are logged. Set
            # before a validation the flag would break that off.
            trainer._signal_connector.received_sigterm = True

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # what the checkpoint's step has logged must not be behind it
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_time = trainer.global_step, self._clock()


def _answer(line: str) -> None:
    """Say something in a signal handler, where `sys.stderr` may be in the middle of a line, or locked."""
    with contextlib.suppress(OSError, AttributeError, ValueError):  # there may be no such stream any more
        os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())  # type: ignore[union-attr]


def _log_this_step(trainer: L.Trainer) -> None:
    """Put the values of this optimizer step into metrics.csv, which Lightning does after `on_train_batch_end`.

    A run that is killed in between goes on behind this step, whose row nobody would write. Lightning's values, the same
    ones, then fill the same row.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return
    values = convert_tensors_to_scalars(connector.metrics["log"])  # host read: once for a checkpoint
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if isinstance(logger, CsvLogger) and values:
            logger.log_metrics({"epoch": trainer.current_epoch, **values}, step)
