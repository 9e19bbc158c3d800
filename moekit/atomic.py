"""Files and folders that are never half-written, and what to say when they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from moekit.errors import UserError

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file is larger than the system allows; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose another folder or change its permissions",
    errno.EPERM: "permission denied; choose another folder or change its permissions",
    errno.ENOTDIR: "a file is in the place of a folder; choose another folder",
    errno.EEXIST: "a file, or a link to nothing, is in the place of a folder; move it away",
    errno.EISDIR: "a folder is in the place of a file; move it away",
    errno.ENAMETOOLONG: "the name is longer than the system allows; choose a shorter one",
    errno.ELOOP: "links lead in a circle; mend them",
    errno.EIO: "the disk cannot be read; use a copy",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_error(path: Path, error: OSError | SafetensorError) -> UserError:
    """The user's view of a failed write: what could not be written, in which folder, and what to do."""
    return UserError(f"cannot write {path.name} in the folder {path.parent}: {reason(error)}.")


def path_error(error: OSError) -> UserError | None:
    """The user's view of a path that cannot be used, for who meets it where nobody asks; None for other troubles."""
    if error.filename is None or error.errno not in _CAUSES:
        return None
    return UserError(f"cannot use {os.fsdecode(error.filename)}: {reason(error)}.")


def reason(error: OSError | SafetensorError) -> str:
    """Why a write failed, and what to do, in the user's words."""
    return _CAUSES.get(getattr(error, "errno", None) or 0, str(getattr(error, "strerror", None) or error))


def disk_trouble(error: BaseException, place: Path) -> OSError | None:
    """The failed write to a disk, full for example, or to a file below `place`, that `error` is or came of, if any."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and (
            found.errno in _FULL
            or (isinstance(found.filename, str) and place.absolute() in Path(found.filename).absolute().parents)
        ):
            return found
        found = found.__cause__ or found.__context__
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell of full disks, read-only folders and the like in the user's words.

    Raises:
        UserError: instead of an `OSError`, and of what torch and safetensors make of one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SafetensorError):
            cause = cause.__cause__ or cause.__context__  # torch turns a failed write into a RuntimeError
        if cause is None:
            raise
        raise write_error(path, cause) from error


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # not every file system can flush a folder
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """The name of a temporary file beside `path`, for libraries that write by name; see `replacing`."""
    temporary = _beside(path, "tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left_over in _left_over(path, "tmp"):
                if not left_over.is_dir():  # of a folder of that name
                    left_over.unlink(missing_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it takes the place of `path` when all is well.

    The bytes are on the disk before the name is: after a crash the file is the old one or the new one, whole. After
    an exception the old one stays and the temporary file is gone; after a SIGKILL a hidden ``.<name>.<pid>.tmp`` may
    be left, which the next `replacing` of the same file removes.

    Raises:
        UserError: full disk, read-only folder and the like, naming the folder.
    """
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which takes the place of `path` and of all that is in it when all is well.

    Its files are on the disk before its name is. After an exception the old folder stays and the new one is gone; after
    a SIGKILL a hidden ``.<name>.<pid>.tmp`` may be left, which the next call for the same folder removes. No system
    replaces a folder that is not empty at once: between two renames it is called ``.<name>.<pid>.old``, where the next
    call finds it after a kill at that moment. For one process at a time: of two, the later one ends the other's draft.

    Raises:
        OSError: full disk, read-only folder and the like; `writing` around it makes a `UserError` of them.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    draft, old = _beside(path, "tmp"), _beside(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    for former in _left_over(path, "old"):
        if not path.exists():
            os.replace(former, path)
    for left_over in (*_left_over(path, "tmp"), *_left_over(path, "old")):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        for written in (*draft.rglob("*"), draft):
            if not written.is_symlink():
                flush(written)
        if path.exists():
            os.replace(path, old)
        os.replace(draft, path)
        flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for useless in (draft, old):
            shutil.rmtree(useless, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{ending}")


def _left_over(path: Path, ending: str) -> list[Path]:
    """What killed processes have left beside `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.{ending}")
    return [found for found in path.parent.iterdir() if name.fullmatch(found.name)]


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
