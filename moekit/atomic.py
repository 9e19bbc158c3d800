"""Writing files that are never half-written, and what to say when they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moekit.errors import UserError

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than the system allows; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
    errno.EPERM: "permission denied; choose another folder or change its permissions",
    errno.ENOTDIR: "a file is in the place of a folder; choose another folder",
}


def write_error(path: Path, error: OSError) -> UserError:
    """The user's view of an `OSError`: what could not be written, in which folder, and what to do."""
    cause = _CAUSES.get(error.errno or 0, str(error.strerror or error))
    return UserError(f"cannot write {path.name} in the folder {path.parent}: {cause}.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it takes the place of `path` when all is well.

    The bytes are on the disk before the name is: after a crash the file is the old one or the new one, whole. After
    an exception the old one stays and the temporary file is gone; after a SIGKILL a hidden ``.<name>.<pid>.tmp`` may
    be left, which the next `replacing` of the same file removes.

    Raises:
        UserError: full disk, read-only folder and the like, naming the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            if not left_over.is_dir():  # of a sharded checkpoint of that name
                left_over.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is not None:
            raise write_error(path, cause) from error
        raise


def _os_error(error: BaseException | None) -> OSError | None:
    """The `OSError` behind an exception: torch turns a failed write into a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, all or nothing."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write plain data as indented JSON, all or nothing. NaN and infinities become null: JSON has no such numbers."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if data - data == 0 else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data
