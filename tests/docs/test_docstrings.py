"""Examples in docstrings give what they say they give."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import moekit

FILES = sorted(Path(moekit.__path__[0]).rglob("*.py"))
MODULES = [info.name for info in pkgutil.walk_packages(moekit.__path__, "moekit.", onerror=lambda _: None)]


@pytest.mark.parametrize("name", ["moekit", *MODULES])
def test_doctests(name: str) -> None:
    if name.endswith(".__main__"):
        pytest.skip("a command, not a module")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags, report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the output above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FILES[0].parent)))
def test_docstrings_are_markdown(path: Path) -> None:
    """`a[b][c]` outside backticks is a link to Markdown, and `make docs` fails on one that leads nowhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            found = links_by_accident(ast.get_docstring(node) or "")
            assert not found, f"{path.name}, {getattr(node, 'name', 'module')}: put {found} into backticks"


def links_by_accident(docstring: str) -> list[str]:
    prose = re.sub(r"(`+).*?\1|^\s*(>>>|\.\.\.).*$", "", docstring, flags=re.M | re.S)
    return re.findall(r"\[[^\[\]\n]+\]\[[^\[\]\n]*\]", prose)


def test_links_by_accident_are_found() -> None:
    assert links_by_accident("Forms by form[plural][case].") == ["[plural][case]"]
    assert links_by_accident("Forms by `form[plural][case]`, ``a[b][c]`` and x[T, D].\n\n    >>> a[b][c]\n") == []
