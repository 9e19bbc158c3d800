"""A new recipe is one module (and its README): every command knows it, and nothing else of the package names it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moekit.recipes
from moekit.cli import program
from moekit.runs.known import recipe_names
from moekit.runs.recipe import find_recipe

PACKAGE = Path(moekit.__file__).parent
ROOMS = ("cli", "runs", "report", "training", "data", "tasks", "inference", "surgery", "planner", "parallel")
"""Where a list of recipes could stand; routers have presets that bear the names of papers too."""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a recipe that is one file: that of a language model under another name."""
    text = (PACKAGE / "recipes" / "moe_lm.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text.replace('name="moe_lm"', 'name="mine"'), encoding="utf-8")
    monkeypatch.setattr(moekit.recipes, "__path__", [*moekit.recipes.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield "mine"
    sys.modules.pop("moekit.recipes.mine", None)


def test_every_command_knows_it(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mine in recipe_names()
    assert find_recipe(mine, "here").name == mine
    assert program.main(["--help"]) == 0
    assert f"  {mine} " in capsys.readouterr().out
    assert program.main(["plan", mine]) == 0
    assert "parameters" in capsys.readouterr().out


def test_nothing_else_names_a_recipe() -> None:
    names = set(recipe_names())
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value}"
        for room in ROOMS
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []
