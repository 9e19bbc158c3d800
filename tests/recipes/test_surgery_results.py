"""The committed tables of surgery and distillation say what the numbers beside them say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_module import module_of

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "zcode_m3"
RESULTS = RECIPE / "results" / "surgery"


@pytest.fixture(scope="module")
def experiments() -> Iterator[ModuleType]:
    with module_of(RECIPE / "experiments" / "surgery.py") as module:
        yield module


@pytest.mark.parametrize("name", ["aggregation", "distillation", "early", "students"])
def test_rows_are_means_and_intervals(experiments: ModuleType, name: str) -> None:
    results: dict[str, list[dict[str, Any]]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert [row[0] for row in rows] == list(results)
    for row in rows:
        cells, own = dict(zip(head, row, strict=True)), results[row[0]]
        for column, key, digits in (("validation nats", "loss", 3), ("BLEU", "bleu", 1), ("chrF", "chrf", 1)):
            mean, half = experiments.interval([run[key] for run in own])
            assert cells[column] == f"{mean:.{digits}f} ± {half:.{digits}f}"
        assert {len(runs) for runs in results.values()} == {int(re.findall(r"(\d+) seeds", text)[0])}
    assert text.strip() in (RECIPE / "results" / "README.md").read_text(encoding="utf-8")


def test_interval_of_known_numbers(experiments: ModuleType) -> None:
    """Student's t with two degrees of freedom: 4.303."""
    mean, half = experiments.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_differences_are_paired(experiments: ModuleType) -> None:
    def run(loss: float, steps: int = 4) -> dict[str, Any]:
        return {"parameters": 10, "loss": loss, "bleu": 1.0, "chrf": 2.0, "curve": [(2, loss + 1), (steps, loss)]}

    arms = [experiments.Arm("base", "base", 0, ""), experiments.Arm("other", "other", 0, "")]
    results = {"base": [run(1.0), run(5.0)], "other": [run(1.5), run(5.5)]}
    assert "| +0.500 ± 0.000 |" in experiments.table(arms, results, "base")
    parents = [arms[0], experiments.Arm("late", "late", 2, "")]
    table = experiments.table(parents, {"base": results["base"], "late": [run(3.0), run(3.0)]}, "base")
    assert "nats after 2 in a row" in table
    assert "| base | 10 | 4 | 4.000 ± " in table
    assert "| late | 10 | 4 | 3.000 ± 0.000 | 3.000 ± 0.000 |" in table
