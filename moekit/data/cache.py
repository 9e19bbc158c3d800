"""Folders that are built once, whoever asks, and are never seen half-built.

A folder is built under a temporary name beside its place and renamed when it is complete, so its mere existence means
that it is whole. Builders of the same folder wait for each other on a kernel lock, which a killed process cannot
leave behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from moekit.errors import UserError

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class CorruptCacheError(UserError):
    """A cached folder does not hold what its header promises."""


def content_key(**parts: Any) -> str:
    """A short hexadecimal name for JSON-like `parts`: equal parts, equal name."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of the file `path`, waiting for whoever has it."""
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process that builds %s.", path.with_suffix(""))
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` so that it is on the disk, not only on its way, when the folder is renamed into place."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def cached_folder(folder: Path, build: Callable[[Path], None], load: Callable[[Path], _T]) -> _T:
    """Load `folder`; where it is missing or damaged, build it first.

    Args:
        folder: its final place; the parent is made.
        build: fills an empty folder.
        load: reads a complete folder; raises `CorruptCacheError` if it is damaged.

    Raises:
        UserError: if the disk is full or the place cannot be written. Nothing half-written is left.
    """
    if folder.is_dir():
        with contextlib.suppress(CorruptCacheError):  # found again, and reported, under the lock
            return load(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f"{folder.name}.lock"):
            return _load_or_build(folder, build, load)
    except OSError as error:
        raise _explained(error, folder.parent) from error


def _load_or_build(folder: Path, build: Callable[[Path], None], load: Callable[[Path], _T]) -> _T:
    if folder.is_dir():
        try:
            return load(folder)
        except CorruptCacheError as error:
            log.warning("%s It is built again.", error)
            shutil.rmtree(folder)
    # We hold the lock, so what other builders of this folder left behind belongs to nobody alive.
    for left_over in folder.parent.glob(f".{folder.name}.building-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    building = folder.parent / f".{folder.name}.building-{os.getpid()}"
    building.mkdir()
    try:
        build(building)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return load(folder)


def _explained(error: OSError, place: Path) -> OSError | UserError:
    """A `UserError` for troubles of the cache's disk; other errors (of the data's own files) unchanged."""
    if error.filename is not None and not _inside(Path(os.fsdecode(error.filename)), place):
        return error
    remedy = "Name another folder with data.cache."
    if error.errno in _FULL:
        return UserError(f"The disk of the cache folder {place} is full ({error.strerror}). Free some space. {remedy}")
    return UserError(f"The cache folder {place} must be writable: {error.strerror or error}. {remedy}")


def _inside(path: Path, place: Path) -> bool:
    return path == place or place in path.parents or path in place.parents
