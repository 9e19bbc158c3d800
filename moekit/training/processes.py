"""What is said when the processes of a run cannot meet, or one of them has ended."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistNetworkError

from moekit.atomic import write_json
from moekit.errors import NonFiniteError, TrainingStoppedError, UserError

_LOST = "the others cannot train without it. Go on from the last checkpoint with --resume."
_SECONDS_TO_TELL = 20.0
_SECONDS_TO_JOIN = 15.0  # until the first word; the next come ever later


def is_first_process() -> bool:
    """Whether this process makes folders and speaks: the one that starts the others, if there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def explained(trainer: L.Trainer, lost: str = _LOST) -> Iterator[None]:
    """Say in the user's words that the port is taken, or which of the processes has ended.

    Args:
        trainer: whose processes they are.
        lost: what it means for the others, and what to do.

    Raises:
        UserError: another program has the port.
        TrainingStoppedError: a process that this one has started, or the one that has started it, has ended.
    """
    parent = os.getppid()
    try:
        with _says_that_it_waits(trainer):
            yield
    except UserError:
        raise
    except RuntimeError as error:
        launcher: Any = trainer.strategy.launcher
        if isinstance(error, DistNetworkError) and "EADDRINUSE" in str(error):
            if launcher is not None:  # the others would try to meet there until the timeout
                launcher.kill(signal.SIGTERM)
            raise UserError(
                "the port at which the processes meet must be free: another program has it. Leave MASTER_PORT out, or "
                "name another port (torchrun --master-port)."
            ) from error
        if trainer.world_size > 1 and not isinstance(error, TrainingStoppedError):
            ended = _ended(getattr(launcher, "procs", []), parent, trainer)
            if ended and launcher is not None:  # those that wait for it in vain
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has no SIGKILL
            if ended:
                raise TrainingStoppedError(f"{ended}, and {lost}") from error
        raise


@contextmanager
def _says_that_it_waits(trainer: L.Trainer) -> Iterator[None]:
    """Say now and then that the others have not joined, in one process of each machine, until all have."""
    over, number = threading.Event(), trainer.num_devices * trainer.num_nodes

    def watch() -> None:
        began, pause = time.monotonic(), _SECONDS_TO_JOIN
        while not over.wait(pause) and not dist.is_initialized():
            _say_waiting(trainer, number, time.monotonic() - began)
            pause *= 2

    if number > 1 and trainer.local_rank == 0:
        threading.Thread(target=watch, name="waits for others", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _say_waiting(trainer: L.Trainer, number: int, seconds: float) -> None:
    strategy: Any = trainer.strategy  # of several processes, which has an environment
    met, timeout = strategy.cluster_environment, getattr(strategy, "_timeout", None)
    end = f" and gives up after {timeout.total_seconds() / 60:.0f} minutes" if timeout else ""
    print(
        f"note: rank {trainer.global_rank} of {number} has waited {seconds:.0f} seconds for the others to join at "
        f"{met.main_address}, port {met.main_port}{end}. Each must be started, see the same address, and reach that "
        "port.",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def stop_noted(trainer: L.Trainer, file: Path, report: str) -> Iterator[None]:
    """Keep in a file why training stopped by itself; of a run that does not stop, none.

    Args:
        trainer: whose training it is.
        file: gets the step, what was said of it, and whether it was of numbers that are not finite.
        report: the command that draws what was logged, which is printed.
    """
    if trainer.is_global_zero:
        file.unlink(missing_ok=True)  # of a run that goes on
    try:
        yield
    except TrainingStoppedError as error:
        if trainer.is_global_zero:
            not_finite = isinstance(error, NonFiniteError)
            write_json(file, {"step": trainer.global_step, "why": str(error), "not_finite": not_finite})
            print(f"what was logged  {report}", flush=True)
        raise


def let_survivors_tell() -> None:
    """Have Lightning wait before it kills this process because one that it started has ended.

    Lightning looks every five seconds, and kills all others of the node with SIGKILL. This process may be about to say
    which one has ended; what waits where it will never be told still ends.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            observer: Any = thread
            observer._terminate_all = functools.partial(_later, observer._terminate_all)


def _later(terminate: Callable[[], None]) -> None:
    time.sleep(_SECONDS_TO_TELL)
    terminate()


def _ended(children: list[Any], parent: int, trainer: L.Trainer) -> str:
    """Which process of this node has ended; nothing if none has. A connection may break before its process is gone."""
    first = trainer.global_rank - trainer.local_rank
    for _ in range(20):
        for number, child in enumerate(children, start=1):
            if child.poll():
                return f"rank {first + number} (process {child.pid}) has ended with code {child.returncode}"
        if trainer.local_rank and os.getppid() != parent:
            return f"rank {first} (process {parent}) has ended"
        time.sleep(0.1)
    return ""
