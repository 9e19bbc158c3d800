"""What is read back from files: plain data of any shape, and archives that are as they were written."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 63
_BLOCK = 1 << 22


def _whole_number(digits: str) -> int:
    number = int(digits)  # of more than 4,300 digits Python raises ValueError
    if not -_LARGEST <= number < 2 * _LARGEST:
        raise ValueError(f"a number has {len(digits)} digits, and whole numbers must fit into 64 bits")
    return number


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


_LINES = json.JSONDecoder(parse_int=_whole_number)
_DECODER = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_each_once)


def parse_json(text: str | bytes, *, repeated: bool = False) -> Any:
    """The data in a JSON text.

    Args:
        text: The text.
        repeated: Whether a key may be in an object several times, of which the last counts: lines of other programs.

    Raises:
        ValueError: It is no JSON, is not UTF-8, is nested too deeply, holds a whole number of more than 64 bits, or a
            key twice in an object.
    """
    try:
        return (_LINES if repeated else _DECODER).decode(
            text if isinstance(text, str) else text.decode("utf-8", "surrogatepass")
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str, check: Callable[[yaml.Node | None], None] = lambda node: None) -> Any:
    """The data in a YAML text: what JSON can hold, and dates.

    Args:
        text: The text.
        check: Looks at what the text says before anything is made of it, and raises ValueError.

    Raises:
        ValueError: It is no YAML, or nested too deeply.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            check(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Values such as `!!bool x` and `!!int` make PyYAML look into tables and empty texts.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def check_archive(path: Path) -> None:
    """Compare every record of a file that ``torch.save`` wrote with its CRC-32, which torch does not look at.

    The whole file is read, once. Its records are stored as they are, so that they can be mapped.

    Raises:
        ValueError: It is no such archive, or is not as it was written.
        OSError: It cannot be read.
    """
    name = ""
    if not path.is_file():  # a device may have no end
        raise ValueError("it is no regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                name = record.filename
                if record.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("it is compressed")
                with archive.open(record) as file:
                    while file.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OverflowError, struct.error) as error:
        part = f" in its record {name!r}" if name else ""
        raise ValueError(f"it is not as it was written{part}: {error}") from None


def checksum(path: Path) -> int:
    """CRC-32 of a file.

    Raises:
        OSError: It cannot be read.
    """
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found
