"""Folders that are built once, whoever asks, and are never seen half-built.

Builders of the same folder wait for each other on a lock of the operating system, which a killed process cannot leave
behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from moekit.atomic import reason, replacing_folder
from moekit.errors import UserError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class CorruptCacheError(UserError):
    """A cached folder does not hold what its header promises."""


def content_key(**parts: Any) -> str:
    """A short hexadecimal name for JSON-like `parts`: equal parts, equal name."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:24]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of the file `path`, waiting for whoever has it."""
    lock = FileLock(path)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        log.info("Waiting for another process that builds %s.", path.with_suffix(""))
        held = lock.acquire()
    with held:
        yield


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
            if folder.is_dir():
                try:
                    return load(folder)
                except CorruptCacheError as error:
                    log.warning("%s It is built again.", error)
            with replacing_folder(folder) as draft:
                build(draft)
            return load(folder)
    except OSError as error:
        raise _explained(error, folder.parent) from error


def _explained(error: OSError, place: Path) -> OSError | UserError:
    """A `UserError` for troubles of the cache's disk; other errors (of the data's own files) unchanged."""
    named = place if error.filename is None else Path(os.fsdecode(error.filename))
    if named != place and place not in named.parents and named not in place.parents:
        return error
    return UserError(f"cannot write to the cache folder {place}: {reason(error)}. data.cache names another folder.")
