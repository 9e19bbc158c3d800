"""A run folder belongs to one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from moekit.atomic import reason, write_error, write_json
from moekit.errors import UserError

_LOCK, _OWNER = ".lock", ".owner.json"
LOCK_FILES = (_LOCK, _OWNER)
"""What lies in a folder while it is held, and after its owner was killed."""


class InUseError(UserError):
    """Another process holds the folder."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made if need be, against other processes that would write to it.

    The lock is the operating system's: it ends with its process, however that ends, and reaches other hosts where a
    network file system passes locks on. Who only reads needs none. Folders that were made here and are empty in the end
    are removed.

    Raises:
        InUseError: another process holds it, which is named with its host.
        UserError: the folder cannot be made.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            _lock(folder, stack)
            stack.callback(_forget, folder)
            write_json(folder / _OWNER, {"pid": os.getpid(), "host": socket.gethostname()})
        except OSError as error:
            raise write_error(folder, error) from error
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    pid, host = _owner(folder)
    abroad = host not in (None, socket.gethostname())
    try:
        stack.enter_context(FileLock(folder / _LOCK).acquire(blocking=False))
    except Timeout:
        raise InUseError(
            f"the run folder {folder} is in use by {_named(pid, host)}: two processes would destroy each other's "
            "files. Wait until it ends, stop it, or choose another --out."
        ) from None
    except OSError as error:
        if not (folder / _LOCK).exists():
            raise  # the folder cannot be written
        # No locks here: what is left is whether somebody began and has not ended in order.
        if pid is not None and (abroad or _runs(pid)):
            raise InUseError(
                f"the run folder {folder} was taken by {_named(pid, host)}, and its file system has no locks that say "
                f"whether that still runs ({reason(error)}). If it does not, delete {folder / _OWNER}."
            ) from error
        _say(
            f"the file system of {folder} has no locks ({reason(error)}): see to it that no other process writes there."
        )
    else:
        if abroad:
            _say(
                f"{folder} was last held by {_named(pid, host)}, which did not end in order. Locks of some network "
                "file systems do not reach other hosts: see to it that it has ended."
            )


def _forget(folder: Path) -> None:
    for name in (_OWNER, _LOCK):  # still under the lock
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _remove_empty(made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for place in made:
            place.rmdir()


def _owner(folder: Path) -> tuple[int | None, str | None]:
    """Process and host that hold a folder, or held it and were killed."""
    try:
        found = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        return int(found["pid"]), str(found["host"])
    except (OSError, ValueError, TypeError, KeyError):
        return None, None


def _named(pid: int | None, host: str | None) -> str:
    return "another process" if pid is None else f"process {pid} on {host}"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
