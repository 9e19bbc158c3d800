"""The experiment on fifty languages: tiers, means and pictures of made-up scores, and the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_module import module_of

from moekit.recipes.zcode_m3 import RECIPE

PLACE = Path(__file__).resolve().parents[2] / "recipes" / "zcode_m3"


@pytest.fixture(scope="module")
def languages() -> Iterator[ModuleType]:
    with module_of(PLACE / "experiments" / "languages.py") as module:
        yield module


@pytest.fixture
def results(languages: ModuleType) -> dict[str, Any]:
    names = ["p", "a", "b", "c", "d"]
    directions = [name for code in names[1:] for name in (f"{code}-p", f"p-{code}")]
    sparse = {name: {"bleu": 2.0 * i, "chrf": 10.0 + i} for i, name in enumerate(directions)}
    dense = {name: {"bleu": 1.0 * i, "chrf": 12.0} for i, name in enumerate(directions)}
    return {"tiers": languages.tiers(names), "sparse": sparse, "dense": dense}


def test_tiers_take_turns(languages: ModuleType) -> None:
    assert languages.tiers(["p", "a", "b", "c", "d"]) == {"a": "large", "b": "middle", "c": "small", "d": "large"}


def test_means_by_tier_and_side(languages: ModuleType, results: dict[str, Any]) -> None:
    """a and d are large: into the pivot directions 0 and 6, from it 1 and 7."""
    rows = languages.rows(results)
    assert [row["directions"] for row in rows] == [2, 2, 1, 1, 1, 1]
    into, out_of = rows[:2]
    assert into["sparse_bleu"] == (0 + 12) / 2
    assert out_of["sparse_chrf"] == (11 + 17) / 2
    assert (into["dense_chrf"], into["ahead"], out_of["ahead"]) == (12.0, 1, 1)


def test_table_and_picture(languages: ModuleType, results: dict[str, Any], tmp_path: Path) -> None:
    text = languages.table(results)
    assert "| large, into the pivot | 6,000 | 2 | 6.0 | 3.0 | 13.0 | 12.0 | 1 |" in text
    assert "| p-d | large | 14.0 | 7.0 | 17.0 | 12.0 |" in text
    languages.drawing(results, tmp_path / "languages.svg")
    assert (tmp_path / "languages.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_options_are_of_the_recipe(languages: ModuleType) -> None:
    """All directions have the pivot, and sizes are of their tiers."""
    options = languages.settings(["p", "a", "b"], steps=7, sentences=3)
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given["--data.directions"] == "a-p,p-a,b-p,p-b"
    assert json.loads(given["--data.babel_sizes"]) == {"a": 6_000, "b": 1_500}
    config = RECIPE.variants["tiny"].config
    for name in given:
        group, field = name.removeprefix("--").split(".")
        assert hasattr(getattr(config, group), field), name
