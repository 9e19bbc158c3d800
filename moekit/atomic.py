"""Files and folders that are never half-written, and what to say when they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
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
    errno.EISDIR: "a folder is in the place of the file; choose another name",
    errno.ENAMETOOLONG: "the name is longer than the system allows; choose a shorter one",
    errno.ELOOP: "it is a symbolic link that leads to itself; choose another name",
    errno.EIO: "the disk cannot be read; use a copy",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DESCRIPTORS = re.compile(r"/proc/(?:self|thread-self|\d+)(?:/task/\d+)?/fd|/dev/fd")


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
    except (UserError, BrokenPipeError):  # the reader of a pipe has left: that is no fault
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SafetensorError):
            cause = cause.__cause__ or cause.__context__  # torch turns a failed write into a RuntimeError
        if cause is None:
            raise
        raise write_error(path, cause) from error


_waiting = ContextVar("_waiting", default=True)


@contextlib.contextmanager
def one_flush() -> Iterator[None]:
    """Wait for the disk once for all files that are written within, not twice for each.

    Should the machine fail before the end, those that have their names already may be empty.
    """
    if not hasattr(os, "sync"):  # only Unix can wait for everything
        yield
        return
    token = _waiting.set(False)
    try:
        yield
    finally:
        _waiting.reset(token)
    os.sync()


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if not _waiting.get():
        return
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
    """The name of a temporary file beside `path`, for libraries that write by name; see `replacing`.

    What is no regular file gets the bytes of a temporary file elsewhere.
    """
    with writing(path):
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / path.name
                with (Path(folder) / path.name).open("rb") as source, _stream(path) as file:
                    shutil.copyfileobj(source, file)
            return
        temporary = _beside(path, "tmp")
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
    be left, which the next `replacing` of the same file removes. Pipes, terminals, devices and the descriptors in
    ``/dev/fd`` are written to, since nothing can take their place. A symbolic link is replaced, so that no run writes
    into the files of another; `followed` goes to its end.

    Raises:
        UserError: full disk, read-only folder and the like, naming the folder.
        BrokenPipeError: nobody reads the pipe any more.
    """
    if _is_stream(path):
        with writing(path), _stream(path) as file:
            yield file
        return
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


def followed(path: Path) -> Path:
    """The end of the symbolic links of a path that a user names, for `replacing` to leave them as they are.

    Raises:
        UserError: a link leads to itself.
    """
    with writing(path):
        if _is_stream(path) or not path.is_symlink():
            return path
        end = Path(os.path.realpath(path))
        if end.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        return end


def require_text(path: Path, what: str) -> None:
    """Make sure that a path is text, as torch and SentencePiece want the paths of their files.

    Raises:
        UserError: some of its bytes are none in UTF-8; `what` begins the message.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} {path} must have a path in UTF-8: some of its bytes are none. Rename it.") from None


def require_apart(inputs: Mapping[str, str | os.PathLike[str] | None], replaced: Iterable[Path]) -> None:
    """Make sure that nothing that is read lies in what will be removed or replaced.

    Args:
        inputs: paths by the option that names them; None = it was not given.
        replaced: files and folders.

    Raises:
        UserError: something does.
    """
    places = [Path(os.path.realpath(place)) for place in replaced]
    for option, given in inputs.items():
        found = None if given is None else Path(os.path.realpath(given))
        for place in places:
            if found is not None and (found == place or place in found.parents):
                raise UserError(
                    f"{option} {os.fspath(given or '')} lies in {place}, which is replaced: it would be lost. Move it, "
                    "or choose another --out."
                )


def require_writable(path: Path) -> None:
    """Make sure, before work is done for it, that a file can probably be written.

    Raises:
        UserError: a folder has its name, or its folder takes no files.
    """
    place = followed(path)
    with writing(path):
        if _is_stream(place):
            return
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        above = next(folder for folder in place.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def _is_stream(path: Path) -> bool:
    """Whether a path is written to as it is: it names a pipe, a terminal, a device or an open descriptor."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    if sys.stdout is not None:
        sys.stdout.flush()  # what was printed before comes before
    entry = _descriptor(path)
    own = entry is not None and os.path.realpath(entry.parent) == os.path.realpath("/proc/self/fd")
    # A descriptor of this process goes on where it is; to open its file anew would begin at the first byte.
    handle = os.dup(int(entry.name)) if entry and own else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY)
    with os.fdopen(handle, "wb") as file:
        yield file


def _descriptor(path: Path) -> Path | None:
    """The entry of a process's open files that a path leads to by its links, as ``/dev/stdout`` does."""
    for _ in range(40):  # as many links as Linux follows
        place = Path(os.path.realpath(path.parent)) / path.name
        if _DESCRIPTORS.fullmatch(str(place.parent)) and place.name.isdigit():
            return place
        if not place.is_symlink():
            return None
        path = place.parent / os.readlink(place)
    return None


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


def clear_drafts(folder: Path) -> None:
    """Remove what killed processes had not written to its end, in a folder that nobody else writes to.

    Raises:
        OSError: it cannot be removed.
    """
    for draft in [found for found in folder.iterdir() if re.fullmatch(r"\..+\.[0-9a-f]+\.tmp", found.name)]:
        shutil.rmtree(draft) if draft.is_dir() and not draft.is_symlink() else draft.unlink()


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
