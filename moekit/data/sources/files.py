"""Reading lines of text from files, plain or compressed, with errors that name file, line and byte.

A line ends at a line feed (a carriage return before it goes away) and nowhere else: U+2028, U+0085 and their kin occur
inside sentences of published corpora, where `str.splitlines` would tear the two sides apart.
"""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import importlib
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moekit.errors import UserError
from moekit.source import Split, digest
from moekit.stored import parse_json

_Key = TypeVar("_Key")

# What people call the splits; the first name of each is ours.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "dev", "val", "validation", "devel"),
    "test": ("test", "tst"),
}


ZSTD_MODULES = ("compression.zstd", "backports.zstd")
"""Python's own from 3.14 on, and the package of older ones."""


def _zstd(data: bytes) -> bytes:
    for module in ZSTD_MODULES:
        try:
            decoder = importlib.import_module(module)
        except ImportError:
            continue
        try:
            return decoder.decompress(data)
        except decoder.ZstdError as error:
            raise OSError(str(error)) from None
    raise LookupError


_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
    ".zst": _zstd,
}
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""The escape of a NUL in JSON: a backslash that is none of a pair, and u0000."""
_PROGRAMS = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks; that of UTF-32 begins with that of UTF-16."""


@dataclass(frozen=True)
class TextFile:
    """A file that has been read.

    Attributes:
        path: where it lies.
        lines: without line ends, all white space else as it is.
        digest: of its bytes after unpacking.
    """

    path: Path
    lines: list[str]
    digest: str


PACKED = "plain or .gz, .xz, .bz2 or .zst"
"""How text may lie on disk, for messages."""


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked if its name ends so, that must not be empty; see `unpacked`.

    Raises:
        UserError: if the file is missing, unreadable, empty, or a broken archive; if nothing here decompresses it.
    """
    try:
        packed = read_to_end(path)
    except OSError as error:
        raise UserError(f"{path}: the file must be readable: {error.strerror or error}.") from error
    data = unpacked(packed, path)
    if not data:
        raise empty_file(path)
    return data


def read_to_end(path: Path) -> bytes:
    """The bytes of a file or a pipe.

    Raises:
        OSError: it cannot be read, or is a device such as /dev/zero, which has no end.
    """
    found = path.stat()
    if stat.S_ISCHR(found.st_mode) and found.st_rdev != os.stat(os.devnull).st_rdev:
        with path.open("rb") as file:
            if not file.isatty():
                raise OSError(errno.EINVAL, "It is a device without an end")
    return path.read_bytes()


def unpacked(data: bytes, path: Path) -> bytes:
    """The bytes of a file after unpacking, if its name ends in ``.gz``, ``.xz``, ``.bz2`` or ``.zst``.

    Raises:
        UserError: if it is a broken archive, or nothing here unpacks it.
    """
    if path.suffix not in _UNPACK or not data:
        return data
    try:
        return _UNPACK[path.suffix](data)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise broken_archive(path, error) from error
    except LookupError:
        raise no_zstd(path) from None


def broken_archive(path: Path, error: Exception) -> UserError:
    """What is said of a file that its program cannot unpack."""
    return UserError(
        f"{path}: a file named {path.suffix} must be a whole {_PROGRAMS[path.suffix]} archive: {error}. Fetch it "
        "again, or rename it."
    )


def no_zstd(path: Path) -> UserError:
    """What is said where nothing unpacks zstd."""
    return UserError(
        f"{path}: a file named {path.suffix} needs Python 3.14 or the package backports.zstd, and neither is here. "
        f"Unpack it first: {_PROGRAMS[path.suffix]} -d {path.name}."
    )


def empty_file(path: Path) -> UserError:
    """What is said of a file without a line."""
    return UserError(f"{path}: a file must hold at least one line: got an empty file. Fill it or remove it.")


def decode(data: bytes, path: Path | str, *, line: int = 1) -> str:
    """`data` as text, without a byte order mark.

    Args:
        data: UTF-8, from the beginning of a line.
        path: for messages.
        line: number of its first line in the file; a mark stands before the first of all alone.

    Raises:
        UserError: if it is not UTF-8, or holds a NUL; the message names line and byte.
    """
    text = data if line > 1 else data.removeprefix(codecs.BOM_UTF8)
    nul = text.find(b"\0")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and data[:4].count(0) > 1:
        encoding = "utf-32" if data[:4].count(0) > 2 else "utf-16"
    if encoding is not None and line == 1:
        raise UserError(
            f"{path}, line 1: text must be UTF-8: it begins as {encoding.upper()} does ({data[:4].hex(' ')}). "
            f"Convert it, for example with iconv -f {encoding} -t utf-8."
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_place(text, error.start, path, line)}: text must be UTF-8: got the byte 0x{text[error.start]:02x} "
            f"({error.reason}). Convert the file, for example with iconv -f latin1 -t utf-8."
        ) from error
    if nul >= 0:
        raise UserError(f"{_place(text, nul, path, line)}: text must be without NUL characters: got one. Remove it.")
    return decoded


def _place(text: bytes, at: int, path: Path | str, first: int) -> str:
    line, byte = text.count(b"\n", 0, at) + first, at - text.rfind(b"\n", 0, at)
    return f"{path}, line {line}, byte {byte} of the line"


def read_lines(path: Path) -> TextFile:
    """The lines of a file; see the module for what a line is.

    Raises:
        UserError: if the file cannot be read, is empty or is not UTF-8.
    """
    data = read_bytes(path)
    lines = decode(data, path).split("\n")
    if not lines[-1]:
        lines.pop()
    if not lines:  # a byte order mark alone
        raise empty_file(path)
    return TextFile(path, [line.removesuffix("\r") for line in lines], digest(data))


def read_json(line: str, where: str) -> Any:
    """What a line of JSON holds.

    Raises:
        UserError: it is no JSON, is nested too deeply or holds a number too long to read; half a character (a lone
            surrogate, as of a text cut between two escapes) or a NUL stands in it. `where` begins the message.
    """
    try:
        found = parse_json(line, repeated=True)
        if "\\u" in line:
            plain = json.dumps(found, ensure_ascii=False)
            plain.encode()
            if _NUL.search(plain):
                raise UserError(f"{where}: text must be without NUL characters: got one. Remove it.")
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: the line must be JSON: {error.msg}. Mend the line.") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{where}: text must be whole characters: got half a surrogate pair, {half}. Mend it."
        ) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: the line must be JSON: {error}. Mend the line.") from error
    return found


def check_folder(path: str | Path, kind: str) -> Path:
    """`path` if it is a folder, else UserError."""
    folder = Path(path)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing there"
        raise UserError(f"{kind}: the path must be a folder: got {what}: {folder}.")
    return folder


def split_called(name: str) -> Split | None:
    """The split that people call `name`, if any."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def unpacked_name(path: Path) -> str:
    """The file's name without ``.gz``, ``.xz``, ``.bz2`` or ``.zst``."""
    return path.stem if path.suffix in _UNPACK else path.name


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of the names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: the folder must be readable: {error.strerror or error}.") from error


def add_file(found: dict[_Key, Path], key: _Key, path: Path, what: str) -> None:
    """Put `path` into `found`.

    Raises:
        UserError: another file is there under this key: nobody can tell which one is meant.
    """
    if key in found:
        first, folder = found[key].name, path.parent
        if unpacked_name(found[key]) == unpacked_name(path):
            raise UserError(f"{folder}: {first} and {path.name} are the same file twice. Remove one.")
        raise UserError(f"{folder}: {first} and {path.name} both hold {what}. Remove one.")
    found[key] = path


def find_split_files(path: Path, kind: str, endings: Sequence[str]) -> list[tuple[Split, Path]]:
    """Files named after a split with one of `endings`, in `path` and its folders; `path` itself if it is a file.

    Raises:
        UserError: if there are none; the message says what was looked for.
    """
    if path.is_file():
        return [("train", path)]
    if not path.is_dir():
        raise UserError(f"{kind}: the path must be a file or a folder: there is nothing at {path}.")
    found: list[tuple[Split, Path]] = []
    for folder in (path, *(entry for entry in entries(path) if entry.is_dir())):
        here: dict[Split, Path] = {}
        for file in entries(folder):
            name = unpacked_name(file)
            ending = next((ending for ending in endings if name.endswith(ending)), None)
            split = split_called(name.removesuffix(ending)) if ending and file.is_file() else None
            if split is None:
                continue
            add_file(here, split, file, f"{split} text")
        found += [(split, here[split]) for split in SPLIT_NAMES if split in here]
    if not found:
        names = ", ".join(f"{name}{endings[0]}" for name in ("train", *SPLIT_NAMES["valid"][:3], "test"))
        raise UserError(
            f"{path}: files must be named {names} (or {', '.join(endings[1:] or endings)}; {PACKED}), here or in "
            "folders one below: found none."
        )
    return found
