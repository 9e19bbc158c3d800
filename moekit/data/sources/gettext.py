"""The translation catalogs that a Linux machine already carries: many languages, no download.

Source: the GNU gettext manual, "The Format of GNU MO Files".
"""

from __future__ import annotations

import codecs
import contextlib
import re
import struct
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from moekit.data.sources.aligned import AlignedBlock, AlignedSource
from moekit.data.sources.files import check_folder
from moekit.errors import UserError, nearest
from moekit.source import SPLITS, Direction, Split, chance, digest, language_code, register_source

DEFAULT_FOLDER = "/usr/share/locale"
_BYTE_ORDERS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_CHARSET = re.compile(rb"charset=([\w.:-]+)", re.IGNORECASE)
# Codecs that decode bytes to text, and are none of a text's characters.
_NO_CHARSETS = frozenset(["idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7"])
# Tables that name the same bytes again and again would fill the memory: messages have room beside each other.
_MAX_SHARING = 4
_NOT_LETTERS = re.compile(r"[\W\d_]+")
# Messages over several lines are texts, not sentences.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# %s, %-10.3f, %1$s, %(name)s, {0}, {name!r:>10}, $name, ${name}, <b>, &amp;
_PLACEHOLDER = re.compile(
    r"%(?:\(\w+\))?(?:\d+\$)?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|ll|[hlqjzt])?[A-Za-z]|%\d|\{\w*(?:![rsa])?(?::[^{}]*)?\}"
    r"|\$\{?\w+\}?|</?\w+[^<>]*>|&#?\w+;"
)
_ACCELERATOR_IN_BRACKETS = re.compile(r"\s*\([_&]\w\)")
_AMPERSAND = re.compile(r"&(?=\w)(?!#?\w+;)")
# Keys in place of English: "menu.file.open", "GL_EXT_texture", "application/pdf".
_IDENTIFIER = re.compile(r"[\w.:/@+=-]*\w[._:/@=]\w[\w.:/@+=-]*|--?\w[\w=-]*")


@register_source
class Gettext(AlignedSource):
    """Pairs of English and other languages out of ``LANGUAGE/LC_MESSAGES/*.mo``.

    Every English message has one translation in a language: the most frequent one (ties: the first in the order of
    catalog names). Which split a message belongs to follows from its English letters alone (capitals, punctuation and
    accelerators aside), so that nothing in the validation or test text of any language occurs in training.

    Args:
        path: the folder that holds the language folders, at any depth.
        languages: only these; by default the `max_languages` with the most pairs.
        max_languages: how many besides English. Candidates are ranked by the sizes that their catalogs declare, and
            the best of them by the pairs left after cleaning.
        min_pairs: a language with fewer training pairs is left out.
        min_chars, max_chars: shortest and longest message, both sides.
        keep_placeholders: keep messages with %s, {name}, <b> and the like.
        valid_share, test_share: of the messages.
        pivot, directions, strict: see `AlignedSource`.

    Raises:
        UserError: if no language has enough pairs; broken catalogs only give a warning that counts them.
    """

    name = "gettext"

    def __init__(
        self,
        path: str | Path = DEFAULT_FOLDER,
        *,
        languages: Sequence[str] | Mapping[str, str] | None = None,
        max_languages: int = 10,
        min_pairs: int = 1_000,
        min_chars: int = 2,
        max_chars: int = 200,
        keep_placeholders: bool = True,
        valid_share: float = 0.02,
        test_share: float = 0.02,
        pivot: str | None = "auto",
        directions: Sequence[str | Direction] | None = None,
        strict: bool = False,
    ) -> None:
        if isinstance(languages, Mapping):
            raise UserError("gettext: languages must be a list of codes: catalogs have no other names for them.")
        if max_languages < 1 or min_pairs < 1:
            raise UserError(
                f"gettext: max_languages and min_pairs must be at least 1: got {max_languages}, {min_pairs}."
            )
        if not 0 < min_chars <= max_chars:
            raise UserError(f"gettext: 0 < min_chars <= max_chars is required: got {min_chars} and {max_chars}.")
        if min(valid_share, test_share) < 0 or valid_share + test_share >= 1:
            raise UserError(
                f"gettext: valid_share and test_share must leave something to train: got {valid_share} and "
                f"{test_share}."
            )
        folder = check_folder(path, "gettext")
        catalogs = _find(folder)
        candidates = _candidates(catalogs, languages, max_languages + 3)
        broken: list[str] = []
        pairs = {code: _pairs(catalogs[code], broken, min_chars, max_chars, keep_placeholders) for code in candidates}
        if broken:
            warnings.warn(
                f"gettext: {len(broken)} broken catalog{'s' * (len(broken) > 1)} skipped; the first: {broken[0]}",
                stacklevel=2,
            )
        shares = (valid_share, test_share)
        blocks = {code: _blocks(code, found, shares, folder) for code, found in pairs.items()}
        training = {code: sum(len(b.columns["en"]) for b in bs if b.split == "train") for code, bs in blocks.items()}
        ranked = sorted(blocks, key=lambda code: (-training[code], code))
        chosen = [code for code in ranked if training[code] >= min_pairs]
        if languages is not None and len(chosen) < len(candidates):
            poor = next(code for code in ranked if code not in chosen)
            raise UserError(
                f"gettext: every language must have min_pairs={min_pairs:,} training pairs: got {training[poor]:,} for "
                f"{poor!r} in {folder}. Lower min_pairs or leave the language out."
            )
        if not chosen:
            best = f"{training[ranked[0]]:,} for {ranked[0]!r}" if ranked else "none"
            raise UserError(
                f"{folder}: a language must have min_pairs={min_pairs:,} training pairs: the most is {best}. Lower "
                "min_pairs, or install packages that carry catalogs."
            )
        limit = len(chosen) if languages is not None else max_languages
        super().__init__(
            [block for code in chosen[:limit] for block in blocks[code]],
            pivot=pivot,
            directions=directions,
            strict=strict,
        )


def _find(folder: Path) -> dict[str, list[Path]]:
    """Catalogs by language, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("LC_MESSAGES/*.mo"), key=lambda path: (path.name, str(path))):
        # "pl.UTF-8" is Polish; "en_GB", "en@quot" are English again.
        name = path.parent.parent.name.partition(".")[0]
        if not re.match(r"en(?![a-zA-Z])|C$|POSIX$", name):
            # A system's folders may bear any name: what is no language code is passed over.
            with contextlib.suppress(UserError):
                found.setdefault(language_code(name), []).append(path)
    if not found:
        raise UserError(
            f"{folder}: catalogs must lie in LANGUAGE/LC_MESSAGES/*.mo, at any depth: found none. Name another folder, "
            "or install packages that carry catalogs, such as iso-codes or libglib2.0-data on Debian (minimal images "
            "leave them out)."
        )
    return found


def _candidates(catalogs: dict[str, list[Path]], wanted: Sequence[str] | None, limit: int) -> list[str]:
    if wanted is not None:
        codes = [language_code(code, "gettext: languages") for code in wanted if code != "en"]
        for code in codes:
            if code not in catalogs:
                raise UserError(
                    f"gettext: languages must be among those that have catalogs: got {code!r}. "
                    f"{nearest(code, catalogs)}"
                )
        return codes
    declared = {code: sum(map(count_messages, paths)) for code, paths in catalogs.items()}
    return sorted(declared, key=lambda code: (-declared[code], code))[:limit]


def count_messages(path: Path) -> int:
    """How many messages a catalog says that it holds; 0 if it is none."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
        return int(struct.unpack_from(f"{_BYTE_ORDERS[head[:4]]}I", head, 8)[0])
    except (OSError, KeyError, struct.error):
        return 0


def read_catalog(path: Path) -> list[tuple[str, str]]:
    """English and translation of the messages of a compiled catalog (.mo), contexts dropped.

    Of a message with plural forms there are two pairs: the singular with the first form and the plural with the last; a
    language with one form for all numbers lends it to the plural, where it means most. Messages that are untranslated
    or cannot be decoded are left out.

    Raises:
        UserError: if the file cannot be read or is no whole catalog; the message says why.

    Differs: `gettext.GNUTranslations` keeps no plural English, and gives up on the first message that it cannot decode.
    """
    try:
        data = path.read_bytes()
        order = _BYTE_ORDERS[data[:4]]
        revision, count, *tables = struct.unpack_from(f"{order}4I", data, 4)
        numbers = [struct.unpack_from(f"{order}{2 * count}I", data, table) for table in tables]
        if sum(sum(row[::2]) for row in numbers) > _MAX_SHARING * len(data):
            raise struct.error("its messages overlap")
        keys, values = (
            [struct.unpack_from(f"{size}s", data, start)[0] for size, start in zip(row[::2], row[1::2], strict=True)]
            for row in numbers
        )
    except OSError as error:
        raise UserError(f"{path}: a catalog must be readable: {error.strerror or error}.") from error
    except KeyError:
        raise UserError(
            f"{path}: a catalog must begin with the bytes de 12 04 95: got {data[:4].hex(' ') or 'an empty file'}."
        ) from None
    except struct.error as error:
        raise UserError(f"{path}: a catalog must be whole: it ends at byte {len(data)} ({error}).") from error
    if revision >> 16 > 1:
        raise UserError(f"{path}: the format must be of major revision 0 or 1: got {revision >> 16}.")
    declared = _CHARSET.search(dict(zip(keys, values, strict=True)).get(b"", b""))
    charset = declared[1].decode("ascii", "replace") if declared else "utf-8"
    if not _is_charset(charset):
        raise UserError(f"{path}: the charset must be a known one: got {charset[:40]!r}.")
    pairs = []
    for key, value in zip(keys, values, strict=True):
        try:
            english = key.decode(charset).rpartition("\4")[2].split("\0")
            forms = value.decode(charset).split("\0")
        except UnicodeError:
            continue
        if key and all(forms):
            if len(english) == 1 or len(forms) > 1:
                pairs.append((english[0], forms[0]))
            if len(english) > 1:
                pairs.append((english[1], forms[-1]))
    return pairs


def _is_charset(name: str) -> bool:
    """Whether it encodes text as bytes, one after the other; Python has codecs for much else."""
    try:
        b"a".decode(name)
    except (LookupError, ValueError, OSError):
        return False
    return codecs.lookup(name).name not in _NO_CHARSETS


def clean(english: str, translation: str) -> tuple[str, str]:
    """Both sides without accelerator marks (``_File``, ``&Open``, ``(_F)``) and without white space around them."""
    if not any(mark in text for text in (english, translation) for mark in "_&"):
        return english.strip(), translation.strip()
    english, translation = (_ACCELERATOR_IN_BRACKETS.sub("", text) for text in (english, translation))
    # An underscore that both sides keep in the same word is part of a name: file_name.
    kept = {word for word in english.split() if "_" in word} & {word for word in translation.split() if "_" in word}

    def plain(text: str) -> str:
        words = (word if word in kept or word.count("_") != 1 else word.replace("_", "") for word in text.split(" "))
        text = " ".join(words)
        return (_AMPERSAND.sub("", text) if len(_AMPERSAND.findall(text)) == 1 else text).strip()

    return plain(english), plain(translation)


def _pairs(
    paths: Sequence[Path], broken: list[str], min_chars: int, max_chars: int, keep_placeholders: bool
) -> dict[str, str]:
    """English -> translation, cleaned; what is wrong with catalogs that cannot be read goes to `broken`."""
    votes: dict[str, Counter[str]] = {}
    for path in paths:
        try:
            found = read_catalog(path)
        except UserError as error:
            broken.append(str(error))
            continue
        for english, translation in (clean(*pair) for pair in found):
            if _is_good(english, translation, min_chars, max_chars, keep_placeholders):
                votes.setdefault(english, Counter())[translation] += 1
    # most_common keeps the order of insertion among equals: the first catalog by name.
    return {english: heard.most_common(1)[0][0] for english, heard in votes.items()}


def _is_good(english: str, translation: str, min_chars: int, max_chars: int, keep_placeholders: bool) -> bool:
    # Chinese and its neighbours say much in one letter.
    least = 1 if translation > "\u2e80" else min_chars
    if not (min_chars <= len(english) <= max_chars and least <= len(translation) <= max_chars):
        return False
    if english == translation or _CONTROL.search(english) or _CONTROL.search(translation):
        return False
    if not any(map(str.isalpha, english)) or not any(map(str.isalpha, translation)) or is_identifier(english):
        return False
    return keep_placeholders or not (has_placeholder(english) or has_placeholder(translation))


def has_placeholder(text: str) -> bool:
    """Whether something in the text is for a program to fill in or to read: ``%s``, ``{name}``, ``<b>``."""
    return _PLACEHOLDER.search(text) is not None


def is_identifier(text: str) -> bool:
    """Whether the text is a key or an option, not English."""
    return _IDENTIFIER.fullmatch(text) is not None


def _blocks(code: str, pairs: dict[str, str], shares: tuple[float, float], folder: Path) -> list[AlignedBlock]:
    sides: dict[Split, tuple[list[str], list[str]]] = {split: ([], []) for split in SPLITS}
    for english in sorted(pairs):
        left, right = sides[split_of(english, *shares)]
        left.append(english)
        right.append(pairs[english])
    return [
        AlignedBlock(split, {"en": left, code: right}, dict.fromkeys(("en", code), str(folder)), digest(*left, *right))
        for split, (left, right) in sides.items()
        if left
    ]


def split_of(english: str, valid_share: float, test_share: float) -> Split:
    """The split of an English message, by the hash of its letters."""
    letters = _NOT_LETTERS.sub("", english.casefold()) or english
    drawn = chance(letters)
    if drawn < valid_share:
        return "valid"
    return "test" if drawn < valid_share + test_share else "train"
