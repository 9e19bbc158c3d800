"""Scripts outside the package take names from it that it has: benchmarks, experiments, and programs of the guides."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for folder in ("benchmarks", "recipes", "docs") for path in (ROOT / folder).rglob("*.py"))


def missing(source: str) -> list[str]:
    """Names that a script imports from moekit and that are not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "moekit":
            continue
        module = importlib.import_module(node.module or "")
        for name in (alias.name for alias in node.names):
            is_module = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{name}") is not None
            if not hasattr(module, name) and not is_module:
                found.append(f"{node.module}.{name}")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_scripts_import_is_there(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_name_that_is_gone_is_found() -> None:
    source = "from moekit.runs import Recipe, Gone\nfrom moekit.errors import Gone\nfrom moekit import routers"
    assert missing(source) == ["moekit.runs.Gone", "moekit.errors.Gone"]
