"""Reading compiled gettext catalogs (.mo) by the bytes, and cleaning what stands in them.

`gettext.GNUTranslations` of the standard library gives up on the first oddity and hides what was wrong; a system's
folders hold odd catalogs, and their reader should say which and why.

Source: the GNU gettext manual, "The Format of GNU MO Files".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moekit.errors import UserError

_MAGIC = 0x950412DE
_HEADER = struct.Struct("<7I")
_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)

# %s, %-10.3f, %1$s, %(name)s, {0}, {name!r:>10}, $name, ${name}, <b>, &amp;
_PLACEHOLDER = re.compile(
    r"%(?:\(\w+\))?(?:\d+\$)?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|ll|[hlqjzt])?[A-Za-z]|%\d|\{\w*(?:![rsa])?(?::[^{}]*)?\}"
    r"|\$\{?\w+\}?|</?\w+[^<>]*>|&#?\w+;"
)
_ACCELERATOR_IN_BRACKETS = re.compile(r"\s*\([_&]\w\)")
_AMPERSAND = re.compile(r"&(?=\w)(?!#?\w+;)")
# Keys in place of English: "menu.file.open", "GL_EXT_texture", "application/pdf".
_IDENTIFIER = re.compile(r"[\w.:/@+=-]*\w[._:/@=]\w[\w.:/@+=-]*|--?\w[\w=-]*")


class BrokenCatalog(UserError):  # noqa: N818
    """A file that is no whole .mo catalog."""


@dataclass(frozen=True)
class Message:
    """One message: the singular and plural English, and the translations of its forms."""

    english: tuple[str, ...]
    translation: tuple[str, ...]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """English and translation: the singular with the first form, the plural with the last.

        A language with one form for all numbers lends it to the plural, where it means most.
        """
        if len(self.english) == 1:
            yield self.english[0], self.translation[0]
            return
        if len(self.translation) > 1:
            yield self.english[0], self.translation[0]
        yield self.english[1], self.translation[-1]


def count_entries(path: Path) -> int:
    """How many messages a catalog says that it holds; 0 if it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return 0
    if len(head) < 12:
        return 0
    for order in "<>":
        magic, _, number = struct.unpack(f"{order}3I", head)
        if magic == _MAGIC:
            return int(number)
    return 0


def read_catalog(path: Path) -> list[Message]:
    """The messages of a catalog, without its header, contexts dropped; untranslated and undecodable ones left out.

    Raises:
        BrokenCatalog: if the file cannot be read or is no whole catalog; the message says why.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BrokenCatalog(f"{path}: a catalog must be readable: {error.strerror or error}.") from error
    if len(data) < _HEADER.size:
        raise BrokenCatalog(f"{path}: a catalog must begin with {_HEADER.size} bytes of header: got {len(data)}.")
    order = next((o for o in "<>" if struct.unpack_from(f"{o}I", data)[0] == _MAGIC), None)
    if order is None:
        raise BrokenCatalog(f"{path}: a catalog must begin with the bytes de 12 04 95: got {data[:4].hex(' ')}.")
    _, revision, number, originals, translations, _, _ = struct.unpack_from(f"{order}7I", data)
    if revision >> 16 > 1:
        raise BrokenCatalog(f"{path}: the format must be of major revision 0 or 1: got {revision >> 16}.")
    for table in (originals, translations):
        if table + 8 * number > len(data):
            raise BrokenCatalog(f"{path}: its {number} messages must fit into the file: it ends at byte {len(data)}.")

    def cells(table: int) -> list[bytes]:
        numbers = struct.unpack_from(f"{order}{2 * number}I", data, table)
        found = []
        for length, start in zip(numbers[::2], numbers[1::2], strict=True):
            if start + length > len(data):
                raise BrokenCatalog(
                    f"{path}: a message must lie inside the file: got bytes {start} to {start + length}."
                )
            found.append(data[start : start + length])
        return found

    keys, values = cells(originals), cells(translations)
    charset = "utf-8"
    for key, value in zip(keys, values, strict=True):
        declared = _CHARSET.search(value) if not key else None
        if declared is not None:
            charset = declared[1].decode("ascii", "replace")
    try:
        "".encode(charset)
    except LookupError as error:
        raise BrokenCatalog(f"{path}: the charset must be a known one: got {charset!r}.") from error
    entries = []
    for key, value in zip(keys, values, strict=True):
        if not key or not value:
            continue
        try:
            english, translation = key.decode(charset), value.decode(charset)
        except UnicodeDecodeError:
            continue
        forms = tuple(translation.split("\0"))
        if all(forms):
            entries.append(Message(tuple(english.rpartition("\4")[2].split("\0")), forms))
    return entries


def clean(english: str, translation: str) -> tuple[str, str]:
    """Both sides without accelerator marks (``_File``, ``&Open``, ``(_F)``) and without white space around them."""
    if not any(mark in text for text in (english, translation) for mark in "_&"):
        return english.strip(), translation.strip()
    english = _ACCELERATOR_IN_BRACKETS.sub("", english)
    translation = _ACCELERATOR_IN_BRACKETS.sub("", translation)
    # An underscore that both sides keep in the same word is part of a name: file_name.
    kept = {word for word in english.split() if "_" in word} & {word for word in translation.split() if "_" in word}
    english, translation = (
        " ".join(word if word in kept or word.count("_") != 1 else word.replace("_", "") for word in text.split(" "))
        for text in (english, translation)
    )
    english, translation = (
        _AMPERSAND.sub("", text) if len(_AMPERSAND.findall(text)) == 1 else text for text in (english, translation)
    )
    return english.strip(), translation.strip()


def has_placeholder(text: str) -> bool:
    """Whether something in the text is for a program to fill in or to read: ``%s``, ``{name}``, ``<b>``."""
    return _PLACEHOLDER.search(text) is not None


def is_identifier(text: str) -> bool:
    """Whether the text is a key or an option, not English."""
    return _IDENTIFIER.fullmatch(text) is not None
