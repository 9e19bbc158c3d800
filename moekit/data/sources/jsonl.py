"""Parallel text as JSON lines, in the form that Hugging Face datasets use for translation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moekit.data.sources.aligned import AlignedBlock, AlignedSource, digest_of
from moekit.data.sources.files import find_split_files, read_json, read_lines
from moekit.data.sources.names import LanguageNames
from moekit.errors import UserError
from moekit.source import Direction, Split, register_source

ENDINGS = (".jsonl", ".json", ".ndjson")
"""Of files of JSON lines; those of packed ones come behind."""

KEY = "translation"
"""Holds the texts of a line by language."""


@register_source
class JsonLines(AlignedSource):
    """Lines such as ``{"translation": {"en": "Good morning.", "de": "Guten Morgen."}}``.

    Args:
        path: a folder with train, valid (or dev, val, validation) and test files ending in .json or .jsonl, plain or
            compressed; or a folder of such folders, as en-hau, en-ibo, fr-bam; or one file, which is training text.
        pivot, directions, strict: see `AlignedSource`.
        languages: which keys are languages; see `LanguageNames`. Other keys are left out, and
            files of other pairs than of those that are named.

    Raises:
        UserError: on bad input, naming file, line and column.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str | Path,
        *,
        pivot: str | None = "auto",
        directions: Sequence[str | Direction] | None = None,
        strict: bool = False,
        languages: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        names = LanguageNames(languages)
        files = find_split_files(Path(path), "jsonl", ENDINGS)
        blocks = names.of_these(partial(_read, split, file, names) for split, file in files)
        names.say("jsonl", Path(path))
        super().__init__(blocks, pivot=pivot, directions=directions, strict=strict)


def _read(split: Split, path: Path, names: LanguageNames) -> AlignedBlock:
    file = read_lines(path)
    if file.lines[0].startswith("["):
        raise UserError(
            f"{path}, line 1: the file must hold one JSON object a line: got the beginning of a JSON array. Write one "
            'object a line, as {"translation": {"en": "...", "de": "..."}}.'
        )
    columns: dict[str, list[str]] = {}
    codes: dict[str, str] = {}
    for number, line in enumerate(file.lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            # An empty line is an empty sentence in every language, and counted as such.
            for column in columns.values():
                column.append("")
            continue
        texts = _texts(line, where)
        if not columns:
            codes = names.choose(texts, where)
            columns = {code: [""] * (number - 1) for code in codes.values()}
        missing = [key for key in codes if key not in texts]
        unknown = [key for key in texts if key not in codes and names.code(key) is not None]
        if missing or unknown:
            wrong = {"missing": missing, "unknown": unknown}
            found = "; ".join(f"{what} {', '.join(these)}" for what, these in wrong.items() if these)
            raise UserError(
                f"{where}: every line of a file must have the same languages ({', '.join(codes)}): {found}. Give "
                '"" where a sentence has no translation.'
            )
        for key, code in codes.items():
            text = texts[key]
            if not isinstance(text, str):
                raise UserError(f"{where}: the text of language {key!r} must be a string: got {type(text).__name__}.")
            # A line feed inside a sentence would become two sentences in any file of lines.
            columns[code].append(text.replace("\r", " ").replace("\n", " ").strip())
    if not columns:
        raise UserError(
            f"{path}: the file must hold translations: got {len(file.lines)} empty lines. Fill it or remove it."
        )
    content = digest_of(file.digest, {code: key for key, code in codes.items()})
    return AlignedBlock(split, columns, dict.fromkeys(columns, str(path)), content)


def _texts(line: str, where: str) -> dict[str, Any]:
    row = read_json(line, where)
    texts = row.get(KEY) if isinstance(row, dict) else None
    if not isinstance(texts, dict):
        got = f"the keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f'{where}: the line must be an object with the key "translation" that holds texts by language, as '
            f'{{"translation": {{"en": "...", "de": "..."}}}}: got {got}.'
        )
    return texts
