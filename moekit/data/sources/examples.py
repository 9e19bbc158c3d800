"""Examples: an input and a target in each line, as for classification, question answering or summarisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moekit.data.sources.files import find_split_files, read_json, read_lines, unpacked_name
from moekit.errors import UserError
from moekit.source import Direction, Source, Split, digest, language_code, register_source

_FIELDS = ("input", "target")
_JSON, _TSV = (".jsonl", ".json", ".ndjson"), (".tsv", ".tab")


@register_source
class Examples(Source):
    """Lines such as ``{"input": "question: Who wrote it? context: ...", "target": "Mary Shelley"}``.

    They are pairs of one direction, as ``en-en``: an input in English, and a target in English.

    Args:
        path: a folder with train, valid (or dev, val, validation) and test files, plain or compressed; or a folder of
            such folders; or one file, which is training text. Files that end in .jsonl (or .json, .ndjson) hold JSON
            lines with the keys input and target, and may hold others; files that end in .tsv (or .tab) have a first
            line that names the columns, input and target among them.
        directions: one, as ``en-en`` (the default) or ``en-de``: the languages of inputs and targets, which a tokenizer
            that exists already must know.

    Raises:
        UserError: on bad input, naming file and line; or more than one direction.

    Source: the form is that of arXiv:1910.10683 section 2.4, every task as text to text.
    """

    name = "examples"

    def __init__(self, path: str | Path, *, directions: Sequence[str] | None = None) -> None:
        wanted = ["en-en"] if directions is None else list(directions)
        if len(wanted) != 1:
            raise UserError(f"examples: one direction is required, as en-en: got {', '.join(wanted) or 'none'}.")
        source, hyphen, target = wanted[0].partition("-")
        if not hyphen:
            raise UserError(
                f"examples: the direction must be two language codes with a hyphen, as en-en: got {wanted[0]!r}."
            )
        self.directions = (Direction(language_code(source), language_code(target)),)
        self.languages = tuple(dict.fromkeys((self.directions[0].source, self.directions[0].target)))
        self._pairs: dict[Split, list[tuple[str, str]]] = {}
        parts = []
        for split, file in find_split_files(Path(path), "examples", (*_JSON, *_TSV)):
            read = read_lines(file)
            parse = _tsv if unpacked_name(file).endswith(_TSV) else _json_lines
            found = list(parse(read.lines, file))
            if not found:
                raise UserError(f"{file}: a file must hold at least one example: got none. Fill it or remove it.")
            self._pairs.setdefault(split, []).extend(found)
            parts.append(f"{split}:{read.digest}")
        self._digest = digest(self.name, *self.directions, *parts)

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Inputs and targets, in the order of the files."""
        self.check_direction(direction)
        return self._pairs.get(self.check_split(split), [])

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Every input and target of a language, once, in order of appearance."""
        self.check_language(language)
        (direction,) = self.directions
        sides = [side for side, code in enumerate((direction.source, direction.target)) if code == language]
        return list(dict.fromkeys(pair[side] for pair in self.parallel(direction, split) for side in sides))

    def fingerprint(self) -> str:
        """Digest of all files and the direction."""
        return self._digest


def _json_lines(lines: Sequence[str], path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = read_json(line, where)
        source, target = (row.get(name) if isinstance(row, dict) else None for name in _FIELDS)
        if not isinstance(source, str) or not isinstance(target, str):
            raise UserError(
                f'{where}: the line must be an object with texts input and target, as {{"input": "...", "target": '
                f'"..."}}: got {line.strip()[:80]}'
            )
        yield _pair([source, target], where)


def _tsv(lines: Sequence[str], path: Path) -> Iterator[tuple[str, str]]:
    header = lines[0].split("\t")
    if any(header.count(name) != 1 for name in _FIELDS):
        raise UserError(
            f"{path}, line 1: the first line must name the columns, parted by tabs, input and target once each: got "
            f"{lines[0][:60]!r}."
        )
    places = [header.index(name) for name in _FIELDS]
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {number}: every line must have as many fields as the first, {len(header)} parted by "
                f"tabs: got {len(cells)}."
            )
        yield _pair([cells[place] for place in places], f"{path}, line {number}")


def _pair(texts: Sequence[str], where: str) -> tuple[str, str]:
    """Both texts on one line each."""
    source, target = (" ".join(text.split()) for text in texts)
    if not source or not target:
        raise UserError(f"{where}: input and target must not be empty. Fill them, or remove the line.")
    return source, target
