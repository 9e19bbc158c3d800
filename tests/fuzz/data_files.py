"""Text as users bring it, in every format that is read: damaged, it is refused by name or read as what it now says.

Nothing in plain text tells that it was changed, so what counts is that nothing but whole lines of text comes out, and
that changed text has another digest, which caches and runs know it by. Archives carry checksums: they are right or
refused.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import logging
import lzma
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import Kind
from mutations import BYTES, Damage

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
from test_sources_gettext import compile_catalog

from moekit.data.lines import read_lines
from moekit.data.sources.gettext import count_messages, read_catalog
from moekit.source import SPLITS, open_source

_WORDS = ("tree", "stone", "Wäsche", "лес", "木", "house", "ran", "the", "green", "it's", "3.5", "—")

ODD_TEXT = (
    b"", b" ", b"\t", b"\r", b"\r\n", b"\n\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfea\x00", b"\0", b"\xe4",
    b"\xed\xa0\x80", "\u2028".encode(), "\u0085".encode(), "\u202e".encode(), "\ufeff".encode(), b"\x1b[31m",
    b"\x0b\x0c\x1c",
    b"__NULL__", b"\t\t\t\t", b'"', b"en\tde", b"src\ttgt", b"de\tde", b"{}", b"[]", b"null", b"1", b'"x"',
    b'{"translation": {}}', b'{"translation": {"en": 1, "de": null}}', b'{"translation": {"en": "a"}}',
    b'{"translation": {"en": "\\ud800", "de": "b"}}', b'{"translation": {"en": "a\\u0000b", "de": "b"}}',
    b'{"translation": {"en": "a\\nb\\u2028c", "de": "\\r"}}', b'{"translation": {"en": "a", "de": "b", "en": "c"}}',
    b'{"input": "a"}', b'{"input": "a", "target": 1}', b'{"input": "\\ud800", "target": "b"}',
    b'{"input": "a\\u0000", "target": "b"}',
    b"9" * 5_000, b"[" * 20_000, b"x" * 300_000, b"input\ttarget", b"<0x0A>", b"\\u0000",
)  # fmt: skip


def odd_line(data: bytes, chance: random.Random) -> bytes:
    """A line becomes something else, goes, is there twice or changes places; or something odd stands inside it."""
    lines = data.split(b"\n")
    place, other, odd = chance.randrange(len(lines)), chance.randrange(len(lines)), chance.choice(ODD_TEXT)
    how = chance.randrange(7)
    if how == 0:
        lines[place] = odd
    elif how == 1:
        del lines[place]
    elif how == 2:
        lines.insert(other, lines[place])
    elif how == 3:
        lines[place], lines[other] = lines[other], lines[place]
    elif how == 4:
        at = chance.randrange(len(lines[place]) + 1)
        lines[place] = lines[place][:at] + odd + lines[place][at:]
    elif how == 5:
        fields = lines[place].split(b"\t")
        fields[chance.randrange(len(fields))] = odd
        lines[place] = b"\t".join(fields)
    else:
        lines.insert(place, odd)
    return b"\n".join(lines)


def other_encoding(data: bytes, chance: random.Random) -> bytes:
    """The same text as another program would have stored it."""
    name = chance.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp1251", "utf-7"])
    return data.decode("utf-8").encode(name, errors="replace")


TEXT: tuple[Damage, ...] = (*BYTES, *[odd_line] * 20, *[other_encoding] * 2)


def _sentences(prefix: str, number: int) -> list[str]:
    chance = random.Random(prefix)
    return [f"{prefix} {number} " + " ".join(chance.choices(_WORDS, k=5)) for number in range(number)]


def _lines(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _make_moses(place: Path, pack: Callable[[bytes], bytes] = bytes, ending: str = "") -> None:
    place.mkdir()
    for split, number in zip(SPLITS, (12, 3, 3), strict=True):
        for language in ("en", "de"):
            (place / f"{split}.{language}{ending}").write_bytes(pack(_lines(_sentences(language, number))))


def _make_text(place: Path) -> None:
    place.mkdir()
    for name in ("train.en", "valid.en", "de.txt"):
        (place / name).write_bytes(_lines(_sentences(name, 12)))


def _rows(number: int) -> list[tuple[str, str]]:
    return list(zip(_sentences("en", number), _sentences("de", number), strict=True))


def _make_tsv(place: Path) -> None:
    place.mkdir()
    for split in SPLITS:
        (place / f"{split}.tsv").write_bytes(_lines(["en\tid\tde", *(f"{a}\t1\t{b}" for a, b in _rows(6))]))


def _make_jsonl(place: Path) -> None:
    place.mkdir()
    for split in SPLITS:
        rows = [json.dumps({"translation": {"en": a, "de": b}}, ensure_ascii=split == "train") for a, b in _rows(6)]
        (place / f"{split}.jsonl").write_bytes(_lines(rows))


def _make_examples(place: Path) -> None:
    place.mkdir()
    rows = [json.dumps({"input": a, "target": b, "id": 3}) for a, b in _rows(6)]
    (place / "train.jsonl").write_bytes(_lines(rows))
    (place / "valid.tsv").write_bytes(_lines(["id\tinput\ttarget", *(f"1\t{a}\t{b}" for a, b in _rows(6))]))


def _catalog(language: str, charset: str = "UTF-8", order: str = "<") -> bytes:
    messages = {a: f"{language} {b}" for a, b in _rows(9)}
    if charset != "UTF-8":
        messages = {f"Page {key[:4]}": f"Seite {value[:5]}" for key, value in messages.items()}
    messages |= {"one file\0many files": "eine Datei\0viele Dateien", "menu\4Open": "Öffnen"}
    return compile_catalog(messages, charset=charset, order=order)


def _make_catalogs(place: Path) -> None:
    for language in ("de", "fr"):
        folder = place / language / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "one.mo").write_bytes(_catalog(language))
        (folder / "two.mo").write_bytes(_catalog(language, "ISO-8859-1", ">"))


def _plain_texts(texts: Sequence[str]) -> list[str]:
    """Texts, each of which must be one line that a file can hold."""
    for text in texts:
        text.encode()
        assert text.strip(), "an empty text"
        assert not set(text) & set("\n\0"), f"no single line: {text[:40]!r}"
    return list(texts)


@contextlib.contextmanager
def remarks() -> Iterator[list[str]]:
    """What moekit logs inside."""
    logger, found = logging.getLogger("moekit"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield found
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


def source_reader(kind: str, **settings: Any) -> Callable[[Path], Any]:
    """Reads all that a kind of source has in a folder; the digest comes first."""

    def read(place: Path) -> Any:
        with warnings.catch_warnings(record=True) as warned, remarks() as said:
            warnings.simplefilter("always")
            source = open_source(kind, place, **settings)
            content = [
                [_plain_texts(side) for side in zip(*source.parallel(direction, split), strict=True)]
                for direction in source.directions
                for split in SPLITS
            ]
            content += [
                _plain_texts(source.monolingual(language, split)) for language in source.languages for split in SPLITS
            ]
        said += [str(warning.message) for warning in warned]
        assert not any("\n" in text for text in said)
        return source.fingerprint(), source.languages, source.directions, content

    return read


def _read_catalog(place: Path) -> Any:
    count_messages(place)
    return read_catalog(place)


def _read_input(place: Path) -> Any:
    lines = read_lines(str(place))
    assert all("\n" not in line and "\0" not in line for line in lines)
    "".join(lines).encode()
    return lines


_PACKED = {".gz": lambda data: gzip.compress(data, mtime=0), ".xz": lzma.compress, ".bz2": bz2.compress}

DATA_FILES = {
    "moses": Kind(_make_moses, source_reader("moses"), TEXT, known=False, digested=True),
    "text": Kind(_make_text, source_reader("text"), TEXT, known=False, digested=True, least=0.05),
    "tsv": Kind(_make_tsv, source_reader("tsv"), TEXT, known=False, digested=True),
    "jsonl": Kind(_make_jsonl, source_reader("jsonl"), TEXT, known=False, digested=True),
    "examples": Kind(_make_examples, source_reader("examples"), TEXT, known=False, digested=True),
    "catalogs": Kind(
        _make_catalogs, source_reader("gettext", min_pairs=2), known=False, digested=True, least=0
    ),  # of two of a language one may be broken
    "catalog": Kind(lambda place: place.write_bytes(_catalog("de")) and None, _read_catalog, known=False),
    "lines of an input": Kind(
        lambda place: place.write_bytes(_lines(_sentences("en", 20))) and None, _read_input, TEXT, known=False,
        least=0.05,
    ),
    **{
        f"moses, {ending}": Kind(
            lambda place, pack=pack, ending=ending: _make_moses(place, pack, ending), source_reader("moses")
        )
        for ending, pack in _PACKED.items()
    },
}  # fmt: skip
