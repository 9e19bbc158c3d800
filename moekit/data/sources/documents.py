"""Text of one language in many files: lines, or rows of JSON."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from moekit.data.sources.blocks import CheckedFile, check_file, walk_lines
from moekit.data.sources.files import PACKED, entries, read_json, split_called, unpacked_name
from moekit.data.sources.names import LanguageNames, looks_like_language
from moekit.data.sources.streamed import Streamed, units
from moekit.errors import UserError
from moekit.source import SPLITS, Split, digest, language_code, register_source

_LINES, _ROWS = (".txt", ".text"), (".jsonl", ".ndjson", ".json")
Unit = Literal["line", "paragraph", "document"]


@register_source
class Documents(Streamed):
    """Many files of text of one language, one after the other in the order of their paths, plain or compressed.

    Of ``.txt`` files the text is their lines; of ``.jsonl`` files it is in rows such as ``{"text": "..."}``, each a
    document. A file or folder below the path, of a pattern below what stands before its first star, with the name of a
    split is of that split (``train-00001.txt.gz``, ``c4-validation.jsonl``, ``test/part.txt``); all others are training
    text.

    Args:
        path: a folder, which is searched with its folders; a pattern such as ``corpus/**/*.jsonl.gz``; or a file.
        unit: "line" = every line is a sentence; "paragraph" = lines are joined until an empty one; "document" = so are
            all lines of a row.
        text_field: the field of rows that holds their text.
        valid_share: this share is held out for validation where no file is; see `Streamed`.
        test_share: likewise for testing.
        languages: the language, alone; by default that after which the folder is named.

    Raises:
        UserError: on bad input, naming file and line.
    """

    name = "documents"

    def __init__(
        self,
        path: str | Path,
        *,
        unit: Unit = "line",
        text_field: str = "text",
        valid_share: float = 0.01,
        test_share: float = 0.01,
        languages: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        check_unit(self.name, unit)
        self.check_shares(valid_share, test_share)
        language = _language(str(path), LanguageNames(languages))
        files: dict[Split, list[CheckedFile]] = {}
        for split, file in _find(path):
            files.setdefault(split, []).append(check_file(file))
        for split, found in files.items():
            for one in found:
                _check(one, unit, text_field)
            if next(_sentences(found, unit, text_field), None) is None:
                raise UserError(f"{path}: {split} files must hold text: got {len(found)} without any.")
        digests = [f"{split}:{file.digest}:{_has_rows(file.path)}" for split, found in files.items() for file in found]
        self._hold(
            {(language, s): partial(_sentences, files[s], unit, text_field) for s in SPLITS if s in files},
            valid_share=valid_share,
            test_share=test_share,
            fingerprint=digest("documents", language, unit, text_field, valid_share, test_share, *digests),
        )


def check_unit(kind: str, unit: str) -> None:
    """Raise UserError unless a unit of text is a known one."""
    if unit not in ("line", "paragraph", "document"):
        raise UserError(f"{kind}: unit must be line, paragraph or document: got {unit!r}.")


def _has_rows(path: Path) -> bool:
    return unpacked_name(path).lower().endswith(_ROWS)


def _check(file: CheckedFile, unit: str, text_field: str) -> None:
    """Say what is wrong with rows before anything is written."""
    if _has_rows(file.path):
        for _ in _sentences([file], unit, text_field):
            pass
    elif unit == "document":
        raise UserError(
            f"{file.path}: a document must be a row of a .jsonl file where data.unit is document: got a file of lines. "
            "Set data.unit to line or paragraph."
        )


def _sentences(files: Sequence[CheckedFile], unit: str, text_field: str) -> Iterator[str]:
    for file in files:
        if not _has_rows(file.path):
            yield from units(walk_lines(file), unit)
            continue
        for number, line in enumerate(walk_lines(file), start=1):
            if line.strip():
                yield from units(_text(line, text_field, f"{file.path}, line {number}").split("\n"), unit)


def _text(line: str, text_field: str, where: str) -> str:
    row = read_json(line, where)
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        got = f"the keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
        if isinstance(row, dict) and text_field in row:
            got = f"{type(text).__name__} there"
        raise UserError(
            f'{where}: the line must be an object with text under the key "{text_field}": got {got}. '
            "data.text_field names another key."
        )
    return text


def _language(path: str, names: LanguageNames) -> str:
    if len(names.codes) > 1:
        raise UserError(
            f"documents: text must be of one language: got {', '.join(names.codes)}. The kind text reads a file for "
            "each language; several corpora are joined, as data.source documents,documents."
        )
    if names.codes:
        return names.codes[0]
    name = Path(path).resolve().name if Path(path).is_dir() else ""
    if not looks_like_language(name):
        raise UserError(
            f"documents: it must be known which language the text of {path} is. Name it, as --data.languages en."
        )
    return language_code(name)


def _find(path: str | Path) -> list[tuple[Split, Path]]:
    place = Path(path)
    if place.is_file():
        return [("train", place)]
    if place.is_dir():
        found, base = list(_below(place)), place
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        literal = re.split(r"[*?\[]", str(path), maxsplit=1)[0]
        base = Path(literal) if literal.endswith(("/", os.sep)) else Path(literal).parent
        if not found:
            raise UserError(f"documents: the path must be a folder, a pattern or a file: there is nothing at {path}.")
    files = [file for file in found if file.is_file() and unpacked_name(file).lower().endswith((*_LINES, *_ROWS))]
    if not files:
        raise UserError(
            f"documents: files must end in {', '.join((*_LINES, *_ROWS))}, {PACKED}: found none among {len(found)} "
            f"at {path}."
        )
    return [(_split(file, base), file) for file in files]


def _below(folder: Path) -> Iterator[Path]:
    for path in entries(folder):
        if path.is_dir():
            yield from _below(path)
        elif not path.name.startswith("."):
            yield path


def _split(file: Path, base: Path) -> Split:
    """The split that the name of the file says, or of one of its folders below `base`."""
    below = file.relative_to(base).parts if file.is_relative_to(base) else (file.name,)
    for name in reversed(below):
        for word in re.split(r"[._-]", name):
            if split := split_called(word):
                return split
    return "train"
