"""Checkpoints that are whole or not there, that are as they were written, and that hold data, not code."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from moekit.atomic import replacing
from moekit.errors import UserError
from moekit.parallel.checkpoint import is_checkpoint, remove_checkpoint
from moekit.parallel.checkpoint.checkpointer import PathLike
from moekit.stored import check_archive
from moekit.training.whole_checkpoint import whole_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads what is as it was written, and no code.

    Give it to a Trainer as ``plugins=[AtomicCheckpointIO()]``. Local files only. It also reads the folders of
    `ExpertParallelStrategy`, and a file replaces one in its place. ``weights_only=False`` does not change how it reads.

    Raises:
        UserError: in saving, if the path is a URL, the disk is full, the folder read-only and the like; in loading, as
            `load_checkpoint`.

    Differs: Lightning 2.6 writes to the system's temporary folder and moves the file. Where that folder is on another
    file system the move is a copy, and a process killed in the middle leaves a torn file in the place of the old
    checkpoint. It also holds the whole checkpoint in memory a second time; this does not.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Write `checkpoint`; a former one at `path` stays whole until the new one is."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options.")
        place = Path(local_path(path))
        with replacing(place) as file:
            torch.save(checkpoint, file)
            if is_checkpoint(place):  # a file cannot be moved over a folder
                remove_checkpoint(place)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU, without executing anything in it."""
        place = local_path(path)
        if is_checkpoint(place):
            return whole_checkpoint(place)
        return load_checkpoint(place, map_location or "cpu")


def local_path(path: PathLike) -> str:
    """A path of this machine's file systems; a ``file://`` URL becomes one.

    Raises:
        UserError: If it is another URL.
    """
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise UserError(
            f"checkpoints must be on a file system of this machine, which all processes share: got {text}. Mount it, "
            "or copy checkpoints there when they are written."
        )
    return text


def load_checkpoint(path: PathLike, map_location: Any = "cpu", *, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint; `mmap` reads tensors only when they are used.

    Before, the whole file is compared with the checksums that it holds: about a second for a gigabyte, once in a
    process as long as the file stays as it is.

    Raises:
        UserError: If the file is missing or broken, not as it was written, or holds more than plain data and tensors.
    """
    try:
        found = os.stat(path)
        _verify(Path(path), found.st_ino, found.st_size, found.st_mtime_ns)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused below, in our words
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}.") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The checkpoint {path} must hold tensors and plain data only: {_first_line(error)} It was "
            "perhaps made by another program; nothing in it has been executed. If you trust it, read it once with "
            "torch.load(path, weights_only=False), replace such objects, and save it anew."
        ) from None
    except _UNREADABLE as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({_first_line(error)}). It is broken or not a checkpoint."
        ) from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"The checkpoint {path} must hold a dictionary: got {type(checkpoint).__name__}.")
    return checkpoint


# What torch's reader makes of records that no writer has written.
_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError,
    struct.error,
)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _verify(path: Path, inode: int, size: int, changed: int) -> None:
    """`check_archive`, once for a file that stays as it is: commands open their checkpoint several times."""
    check_archive(path)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
