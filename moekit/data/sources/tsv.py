"""Parallel text in tab-separated files with a header of language codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moekit.data.sources.aligned import AlignedBlock, AlignedSource
from moekit.data.sources.files import find_split_files, read_lines
from moekit.errors import UserError
from moekit.source import Direction, Split, language_code, register_source


@register_source
class Tsv(AlignedSource):
    """Files whose first line is ``en<TAB>de<TAB>fr`` and whose other lines are sentences; no quoting.

    Args:
        path: a folder with train.tsv, valid.tsv (or dev, val, validation) and test.tsv, plain or .gz, or a folder of
            such folders; or one file, which is training text.
        pivot, directions, strict: see `AlignedSource`.

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
    ) -> None:
        blocks = [_read(split, file) for split, file in find_split_files(Path(path), "tsv", (".tsv", ".tab"))]
        super().__init__(blocks, pivot=pivot, directions=directions, strict=strict)


def _read(split: Split, path: Path) -> AlignedBlock:
    file = read_lines(path)
    header = file.lines[0].split("\t")
    if len(header) < 2:
        raise UserError(
            f"{path}, line 1: the header must be two or more language codes parted by tabs, as en<TAB>de: got "
            f"{file.lines[0][:60]!r}."
        )
    codes = [language_code(field, f"{path}, line 1") for field in header]
    if len(set(codes)) < len(codes):
        raise UserError(f"{path}, line 1: every language may have one column: got {', '.join(codes)}.")
    if len(file.lines) < 2:
        raise UserError(f"{path}: a file must hold at least one line after its header: got none.")
    columns: dict[str, list[str]] = {code: [] for code in codes}
    for number, line in enumerate(file.lines[1:], start=2):
        # An empty line is an empty sentence in every language, and counted as such.
        fields = line.split("\t") if line.strip() else [""] * len(codes)
        if len(fields) != len(codes):
            missing = f" Missing: {', '.join(codes[len(fields) :])}." if len(fields) < len(codes) else ""
            raise UserError(
                f"{path}, line {number}: every line must have as many fields as the header, {len(codes)} parted by "
                f"tabs ({', '.join(codes)}): got {len(fields)}.{missing}"
            )
        for column, field in zip(columns.values(), fields, strict=True):
            column.append(field.strip())
    return AlignedBlock(split, columns, dict.fromkeys(columns, str(path)), file.digest, first_line=2)
