"""What the processes of a run must have in common, and what is said when they cannot meet or one has ended."""

from __future__ import annotations

import hashlib
import inspect
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistNetworkError

import moekit
from moekit.data.module import MultitaskData
from moekit.errors import TrainingStoppedError, UserError
from moekit.runs.plain import flatten
from moekit.runs.recipe import Recipe

_OWN = ("data.path", "data.cache", "data.tokenizer", "data.num_workers", "init_from", "teacher")
"""Settings that each machine may have for itself: paths, whose content is compared, and workers."""


def is_first_process() -> bool:
    """Whether this process makes folders and speaks: the one that starts the others, if there are others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def shared_facts(recipe: Recipe, settings: Mapping[str, Any], data: MultitaskData) -> dict[str, Any]:
    """What must be the same on all processes: settings, versions, the source of moekit and of the recipe, the text."""
    package = Path(moekit.__file__).parent
    sources = {*package.rglob("*.py"), Path(inspect.getfile(recipe.build))}
    digest = hashlib.sha256()
    for path in sorted(sources, key=lambda path: path.parts[-3:]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        **{name: value for name, value in flatten(settings).items() if not name.startswith(_OWN)},
        "version of moekit": moekit.__version__,
        "version of torch": torch.__version__,
        "source of moekit and the recipe": digest.hexdigest()[:16],
        "text": data.source.fingerprint()[:16],
        "tokenizer": data.tokenizer.fingerprint[:16],
    }


@contextmanager
def explained(trainer: L.Trainer) -> Iterator[None]:
    """Say in the user's words that the port is taken, or which of the processes has ended.

    Raises:
        UserError: another program has the port.
        TrainingStoppedError: a process that this one has started, or the one that has started it, has ended.
    """
    parent = os.getppid()
    try:
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
            if ended:
                raise TrainingStoppedError(
                    f"{ended}, and the others cannot train without it. Go on from the last checkpoint with --resume."
                ) from error
        raise


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
