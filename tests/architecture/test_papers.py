"""The index of papers is true: every row names code that exists, and that code cites the paper."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "papers.md"
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
COLUMNS = ["Paper", "arXiv", "Idea", "Symbol", "Recipe", "Differs"]


def table() -> list[dict[str, str]]:
    """Rows of the index; a pipe inside a cell is not needed and not understood."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]]


ROWS = table()


def code_spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def resolve(symbol: str) -> object:
    """`moekit.routers.switch` -> the object; the longest importable prefix is the module."""
    module, _, name = symbol.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_rows_are_complete() -> None:
    assert len(ROWS) >= 6
    for row in ROWS:
        assert ARXIV.search(row["arXiv"]), f"{row['Paper']}: no arXiv id"
        assert code_spans(row["Symbol"]), f"{row['Paper']}: no symbol"
        assert all(row[column] for column in COLUMNS), f"{row['Paper']}: an empty cell"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Paper"])
def test_symbols_exist_and_cite(row: dict[str, str]) -> None:
    arxiv = ARXIV.search(row["arXiv"])
    assert arxiv is not None
    for symbol in code_spans(row["Symbol"]):
        source = Path(inspect.getfile(resolve(symbol))).read_text(encoding="utf-8")  # type: ignore[arg-type]
        assert arxiv[0] in source, f"{symbol} must cite arXiv:{arxiv[0]} in its file"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["Paper"])
def test_recipes_exist(row: dict[str, str]) -> None:
    for name in code_spans(row["Recipe"]):
        assert (ROOT / "moekit" / "recipes" / f"{name}.py").is_file()
        assert (ROOT / "recipes" / name / "README.md").is_file()


def test_papers_cited_by_presets_are_in_the_index() -> None:
    listed = set(ARXIV.findall(PAGE.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "moekit" / "routers").rglob("*.py")):
        cited = set(re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text(encoding="utf-8")))
        assert cited <= listed, f"{path.name} cites {sorted(cited - listed)}, which docs/papers.md lacks"
