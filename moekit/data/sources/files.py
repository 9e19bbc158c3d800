"""Reading lines of text from files, plain or compressed, with errors that name file, line and byte.

A line ends at a line feed (a carriage return before it goes away) and nowhere else: U+2028, U+0085 and their kin occur
inside sentences of published corpora, where `str.splitlines` would tear the two sides apart.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moekit.errors import UserError
from moekit.source import Split, digest

_Key = TypeVar("_Key")

# What people call the splits; the first name of each is ours.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "dev", "val", "validation", "devel"),
    "test": ("test", "tst"),
}


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


def _decompress_zst(data: bytes) -> bytes:
    for name in ("compression.zstd", "zstandard"):  # of Python 3.14, else of a package
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if name == "zstandard":
            with module.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
                unpacked: bytes = reader.read()
            return unpacked
        return bytes(module.decompress(data))
    raise ModuleNotFoundError


_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
    ".zst": _decompress_zst,
}
PACKED = "plain or .gz, .xz, .bz2 or .zst"
"""How text may lie on disk, for messages."""


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in ``.gz``, ``.xz``, ``.bz2`` or ``.zst``.

    Raises:
        UserError: if the file is missing, unreadable, empty, or a broken archive; if nothing here decompresses it.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the file must be readable: {error.strerror or error}.") from error
    if (decoder := _DECODERS.get(path.suffix)) is not None and packed:
        try:
            packed = decoder(packed)
        except ModuleNotFoundError:
            raise UserError(
                f"{path}: reading .zst needs Python 3.14 or the package zstandard: neither is here. Install it (pip "
                "install zstandard), or decompress the file."
            ) from None
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # each library has its own
            what = path.suffix.removeprefix(".").replace("gz", "gzip")
            raise UserError(
                f"{path}: a file named {path.suffix} must be a whole {what} archive: {error}. Fetch it again, or "
                "rename it."
            ) from error
    if not packed:
        raise _empty(path)
    return packed


def _empty(path: Path) -> UserError:
    return UserError(f"{path}: a file must hold at least one line: got an empty file. Fill it or remove it.")


def decode(data: bytes, path: Path) -> str:
    """`data` as text, without a byte order mark.

    Raises:
        UserError: if it is not UTF-8, or holds a NUL; the message names line and byte.
    """
    text = data.removeprefix(codecs.BOM_UTF8)
    nul = text.find(b"\0")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or data[:4].count(0) > 1:
        raise UserError(
            f"{path}, line 1: text must be UTF-8: got what looks like UTF-16 or UTF-32 ({data[:4].hex(' ')}). "
            "Convert it, for example with iconv -f utf-16 -t utf-8."
        )
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_place(text, error.start, path)}: text must be UTF-8: got the byte 0x{text[error.start]:02x} "
            f"({error.reason}). Convert the file, for example with iconv -f latin1 -t utf-8."
        ) from error
    if nul >= 0:
        raise UserError(f"{_place(text, nul, path)}: text must hold no NUL characters: got one. Remove it.")
    return decoded


def _place(text: bytes, at: int, path: Path) -> str:
    line, byte = text.count(b"\n", 0, at) + 1, at - text.rfind(b"\n", 0, at)
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
        raise _empty(path)
    return TextFile(path, [line.removesuffix("\r") for line in lines], digest(data))


def read_json(line: str, where: str) -> Any:
    """What a line of JSON holds.

    Raises:
        UserError: it is no JSON, is nested too deeply or holds a number too long to read; half a character (a lone
            surrogate, as of a text cut between two escapes) stands in it. `where` begins the message.
    """
    try:
        found = json.loads(line)
        if "\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: the line must be JSON: {error.msg}. Mend the line.") from error
    except RecursionError as error:
        raise UserError(f"{where}: the line must be JSON of few levels: it is nested too deeply.") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{where}: text must be whole characters: got half a surrogate pair, {half}. Mend it."
        ) from error
    except ValueError as error:
        raise UserError(f"{where}: the line must be JSON with numbers of a usual length: {error}.") from error
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
    return path.stem if path.suffix in _DECODERS else path.name


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
