"""Rows of text, for a terminal or a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A heading and labelled cells; all columns of a table have the same labels."""

    heading: str
    cells: tuple[tuple[str, str], ...]


def text_table(columns: Sequence[Column], *, width: int = 40) -> str:
    """The columns side by side, for a terminal.

    Args:
        columns: at least one.
        width: characters of the label and of each column.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column.heading, justify="right")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(row[0][0], *(cell for _, cell in row))
    file = io.StringIO()
    Console(file=file, width=width * (1 + len(columns)), color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip())


def markdown_table(columns: Sequence[Column]) -> str:
    """The columns side by side, in Markdown."""
    lines = [
        "| | " + " | ".join(column.heading for column in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for row in zip(*(column.cells for column in columns), strict=True):
        lines.append(f"| {row[0][0]} | " + " | ".join(cell for _, cell in row) + " |")
    return "\n".join(lines)
