"""Folders that are built once, whoever asks, and are never seen half-built, nor otherwise than they were built.

Builders of the same folder wait for each other on a lock of the operating system, which a killed process cannot leave
behind. A list of the folder's name and of its files with their checksums is in each; every file is compared with it
when the folder is opened, which takes about half a second for a gigabyte.
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
from moekit.stored import checksum, parse_json

log = logging.getLogger(__name__)

_T = TypeVar("_T")

CONTENTS = "contents.json"
"""What a cached folder holds, and under which name it was built."""


class CorruptCacheError(UserError):
    """A cached folder does not hold what was written into it."""


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
        load: reads a folder that is as it was built; raises `CorruptCacheError` if it cannot use it.

    Raises:
        UserError: if the disk is full or the place cannot be read or written. Nothing half-written is left.
    """

    def checked() -> _T:
        check_contents(folder)
        return load(folder)

    try:
        if folder.is_dir():
            with contextlib.suppress(CorruptCacheError):  # found again, and reported, under the lock
                return checked()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f"{folder.name}.lock"):
            if folder.is_dir():
                try:
                    return checked()
                except CorruptCacheError as error:
                    log.warning("%s It is built again.", error)
            with replacing_folder(folder) as draft:
                build(draft)
                (draft / CONTENTS).write_text(json.dumps(_contents(draft, folder.name), indent=1), encoding="utf-8")
            return load(folder)
    except OSError as error:
        raise _explained(error, folder.parent) from error


def check_contents(folder: Path) -> None:
    """Compare all of a cached folder with what was written into it, under this name; hidden files are nobody's.

    Raises:
        CorruptCacheError: naming the file that differs.
        OSError: a file cannot be read.
    """
    try:
        said = parse_json((folder / CONTENTS).read_bytes())
        files = dict(said["files"])
    except FileNotFoundError:
        raise CorruptCacheError(f"{folder} must list what it holds: {CONTENTS} is missing.") from None
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptCacheError(f"{folder / CONTENTS} must list what the folder holds: {error!r}.") from None
    here = _contents(folder, folder.name)
    for name in sorted({*files, *here["files"]}):
        if files.get(name) != here["files"].get(name):
            raise CorruptCacheError(f"{folder / name} must be as it was written: its size or checksum differs.")
    if said != here:
        raise CorruptCacheError(f"{folder} must be as it was written: it was built under another name.")


def _contents(folder: Path, name: str) -> dict[str, Any]:
    files = (f for f in sorted(folder.iterdir()) if f.is_file() and f.name != CONTENTS and not f.name.startswith("."))
    return {"folder": name, "files": {path.name: [path.stat().st_size, checksum(path)] for path in files}}


def _explained(error: OSError, place: Path) -> OSError | UserError:
    """A `UserError` for troubles of the cache's disk; other errors (of the data's own files) unchanged."""
    named = place if error.filename is None else Path(os.fsdecode(error.filename))
    if named != place and place not in named.parents and named not in place.parents:
        return error
    return UserError(f"cannot use the cache folder {place}: {reason(error)}. data.cache names another folder.")
