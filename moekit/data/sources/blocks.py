"""Text files a block at a time: checked, hashed and walked through without holding more than some lines.

What a line is, and what is said of bad files, is as in `moekit.data.sources.files`.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moekit.data.sources.files import ZSTD_MODULES, broken_archive, decode, empty_file, no_zstd
from moekit.errors import UserError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class CheckedFile:
    """A file that has been read once, from the beginning to the end.

    Attributes:
        path: where it lies.
        lines: their number.
        filled: whether any holds more than white space.
        digest: of its bytes after unpacking, as `TextFile.digest`.
    """

    path: Path
    lines: int
    filled: bool
    digest: str


def check_file(path: Path) -> CheckedFile:
    """Read a file to its end, and hold a block of it at a time.

    Raises:
        UserError: as `files.read_lines`; the file changes meanwhile.
    """
    # The digest begins with the size, which of an archive nobody knows before it is unpacked.
    size = sum(map(len, _blocks(path))) if path.suffix in _OPEN else path.stat().st_size
    state = hashlib.sha256(size.to_bytes(8, "little"))
    lines, filled, read = 0, False, 0
    for block in _whole_lines(path):
        read += len(block)
        state.update(block)
        found = _lines(decode(block, path, line=lines + 1))
        lines += len(found)
        filled = filled or any(map(str.strip, found))
    if not lines:
        raise empty_file(path)
    if read != size:
        raise _changed(path)
    return CheckedFile(path, lines, filled, state.hexdigest())


def walk_lines(file: CheckedFile) -> Iterator[str]:
    """The lines of a file, a block at a time.

    Raises:
        UserError: it is not what it was when it was checked.
    """
    number = 0
    for block in _whole_lines(file.path):
        found = _lines(decode(block, file.path, line=number + 1))
        number += len(found)
        yield from found
    if number != file.lines:
        raise _changed(file.path)


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Blocks that end where lines end."""
    rest: list[bytes] = []  # of a line that is longer than a block
    for block in _blocks(path):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join((*rest, block[:end]))
            rest = []
        rest.append(block[end:])
    if last := b"".join(rest):
        yield last


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if its name ends so."""
    try:
        with _OPEN.get(path.suffix, _plain)(path) as file:
            while block := file.read(_BLOCK):
                yield block
    except EOFError as error:
        raise broken_archive(path, error) from error
    except LookupError:
        raise no_zstd(path) from None
    except (OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        if path.suffix not in _OPEN or getattr(error, "errno", None) is not None:
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: the file must be readable: {said}.") from error
        raise broken_archive(path, error) from error


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _zstd(path: Path) -> Any:
    for module in ZSTD_MODULES:
        try:
            decoder = importlib.import_module(module)
        except ImportError:
            continue
        return _explaining(decoder, path)
    raise LookupError


class _explaining:  # noqa: N801 (a context, used as a function)
    """A file of zstd whose errors are those of the other archives."""

    def __init__(self, decoder: Any, path: Path) -> None:
        self._file, self._error = decoder.open(path, "rb"), decoder.ZstdError

    def __enter__(self) -> _explaining:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        try:
            found: bytes = self._file.read(size)
        except self._error as error:
            raise OSError(str(error)) from None
        return found


_OPEN: Mapping[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstd}


def _changed(path: Path) -> UserError:
    return UserError(f"{path}: the file must stay as it is while it is read: it has changed. Begin again.")
