"""Parallel text in tab-separated files with a header of language codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from moekit.data.sources.aligned import AlignedBlock, AlignedSource, digest_of
from moekit.data.sources.files import find_split_files, read_lines
from moekit.data.sources.names import LanguageNames, looks_like_language
from moekit.errors import UserError
from moekit.source import Direction, Split, digest, register_source

_MISSING = "__NULL__"  # what stands for a missing sentence in the TED corpus of arXiv:1804.06323
_NO_TEXT = "-"


@register_source
class Tsv(AlignedSource):
    """Files whose first line is ``en<TAB>de<TAB>fr`` and whose other lines are sentences; no quoting.

    A column whose heading is no language code is left out, and so is one in which no line has a letter (numbers, or
    only ``__NULL__``, which stands for a missing sentence). What was left out is said.

    Args:
        path: a folder with train.tsv, valid.tsv (or dev, val, validation) and test.tsv, plain or compressed, or a
            folder of such folders; or one file, which is training text.
        pivot, directions, strict: see `AlignedSource`.
        languages: which headings are languages; see `LanguageNames`. Files of other pairs than of those that are named
            are left out.
        columns: headings for files that have none, in order, ``-`` for a column that is no text.

    Raises:
        UserError: on bad input, naming file and line.
    """

    name = "tsv"

    def __init__(
        self,
        path: str | Path,
        *,
        pivot: str | None = "auto",
        directions: Sequence[str | Direction] | None = None,
        strict: bool = False,
        languages: Sequence[str] | Mapping[str, str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        named = [name for name in columns or () if name != _NO_TEXT]
        names = LanguageNames(languages or named or None)
        files = find_split_files(Path(path), "tsv", (".tsv", ".tab"))
        blocks = names.of_these(partial(_read, split, file, names, list(columns or ())) for split, file in files)
        names.say("tsv", Path(path))
        super().__init__(blocks, pivot=pivot, directions=directions, strict=strict)


def _read(split: Split, path: Path, names: LanguageNames, columns: list[str]) -> AlignedBlock:
    file = read_lines(path)
    first = [field.strip() for field in file.lines[0].split("\t")]
    begin = 0 if columns and first != columns else 1
    header = columns or first
    if len(first) < 2:
        raise UserError(
            f"{path}, line 1: the header must be two or more language codes parted by tabs, as en<TAB>de: got "
            f"{file.lines[0][:60]!r}."
        )
    if not columns and sum(bool(names.code(field)) or looks_like_language(field) for field in header) < 2:
        raise UserError(
            f"{path}, line 1: the header must hold two or more language codes, as en<TAB>de: got "
            f"{file.lines[0][:60]!r}. For a file without a header name the columns, as --data.columns en,de,- ('-' is "
            "no text); for other headings say what they are, as --data.languages src=en,tgt=de."
        )
    codes = names.choose((field for field in header if field != _NO_TEXT), f"{path}, line 1")
    if len(file.lines) == begin:
        raise UserError(f"{path}: a file must hold at least one line after its header: got none.")
    places = {code: header.index(name) for name, code in codes.items()}
    texts: dict[str, list[str]] = {code: [] for code in places}
    for number, line in enumerate(file.lines[begin:], start=begin + 1):
        # An empty line is an empty sentence in every language, and counted as such.
        fields = line.split("\t") if line.strip() else [""] * len(header)
        if len(fields) != len(header):
            missing = f" Missing: {', '.join(header[len(fields) :])}." if len(fields) < len(header) else ""
            raise UserError(
                f"{path}, line {number}: every line must have as many fields as the header, {len(header)} parted by "
                f"tabs ({', '.join(header)}): got {len(fields)}.{missing}"
            )
        for code, place in places.items():
            texts[code].append(fields[place].strip())
    content, has_missing = file.digest, False
    for code, lines in list(texts.items()):
        if _MISSING in lines:
            texts[code] = lines = ["" if line == _MISSING else line for line in lines]
            has_missing = True
        if any(lines) and not any(any(map(str.isalpha, line)) for line in lines):
            names.leave_out([header[places[code]]])
            del texts[code]
    if has_missing:
        texts = {code: lines for code, lines in texts.items() if any(lines)}
        content = digest(content, _MISSING)
    if len(texts) < 2:
        raise UserError(f"{path}: at least two columns must hold text: got {', '.join(texts) or 'none'}.")
    read = {code: places[code] for code in texts}
    if not columns:
        content = digest_of(content, {code: header[place] for code, place in read.items()})
    elif [*read.values()] != [*range(len(read))]:  # the order of the languages does not say it
        content = digest_of(content, read)
    return AlignedBlock(split, texts, dict.fromkeys(texts, str(path)), content, first_line=begin + 1)
