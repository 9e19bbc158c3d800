"""Lines of text from and to what a user names: a file, packed or not, a pipe, or a standard stream."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable
from pathlib import Path

from moekit.atomic import followed, reason, replacing
from moekit.data.sources.files import decode, read_to_end, unpacked
from moekit.errors import UserError
from moekit.terminal import write_encoded

STANDARD = "-"
"""Names standard input, or standard output."""


def read_lines(name: str, option: str = "--input") -> list[str]:
    """The lines of a file, or of standard input for "-", without line ends.

    A line ends at a line feed and nowhere else; a carriage return before it goes away. Files that end in ``.gz``,
    ``.xz``, ``.bz2`` and ``.zst`` are unpacked. Text is UTF-8 whatever the locale.

    Args:
        name: the file.
        option: the option that names it, for what is said of it.

    Raises:
        UserError: naming file and line: it cannot be read, is not UTF-8, holds a NUL, or only a byte order mark.
    """
    place = "standard input" if name == STANDARD else f"{option} {name}"
    try:
        data = _standard_input() if name == STANDARD else unpacked(read_to_end(Path(name)), Path(name))
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror or error}.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {place}: {error}.") from None  # a NUL in the name
    if data and not data.removeprefix(codecs.BOM_UTF8):
        raise UserError(f"{place}, line 1: a file must hold text: got a byte order mark and nothing else.")
    lines = decode(data, place).split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        require_plain(line, f"{place}, line {number}")
    return [line.rstrip("\r") for line in lines]


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise UserError("cannot read standard input: it is closed. Give a file with --input.")
    binary = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read().encode("utf-8", errors="surrogatepass") if binary is None else binary.read()


def require_plain(text: str, place: str) -> None:
    """Make sure that text can be tokenized as it is.

    Raises:
        UserError: naming the place: it holds a NUL, or half of a surrogate pair, which is no character.
    """
    for number, character in enumerate(text, start=1):
        if character == "\0":
            raise UserError(f"{place}, character {number}: text must be without NUL characters: got one. Remove it.")
        if "\ud800" <= character <= "\udfff":
            raise UserError(
                f"{place}, character {number}: text must be UTF-8: got half of a surrogate pair, "
                f"U+{ord(character):04X}. Remove it."
            )


def one_line(text: str) -> str:
    """`text` with a space for every line break that it holds, of whatever kind."""
    return " ".join(text.splitlines())


def write_lines(name: str, lines: Iterable[str]) -> None:
    """Write lines in UTF-8, all or nothing, to a file or to standard output for "-".

    Raises:
        UserError: full disk, read-only folder and the like, naming the file.
        BrokenPipeError: nobody reads the output any more.
    """
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    if name != STANDARD:
        with replacing(followed(Path(name))) as file:
            file.write(data)
        return
    if sys.stdout is None:
        raise UserError("cannot write to standard output: it is closed. Give a file with --output.")
    try:
        write_encoded(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to standard output: {reason(error)}.") from None
