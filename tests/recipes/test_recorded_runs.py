"""Every recipe computes what it computed when its run was recorded: losses, validation, test, routing, translations.

`recorded/NAME.json` holds what a short run of each recipe left, and the machine that it ran on. On such a machine every
number must be the same to the last digit. On others losses may differ by 5 %: sums are taken in another order there.

A new recipe (``-k NAME``), and a change that is meant to compute something else, record on the machine of the records::

    pytest tests/recipes/test_recorded_runs.py -m slow --record-runs
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from recording import differences, machine, read_folder, shown, write_record

import moekit.recipes

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).with_name("recorded")
NAMES = sorted(info.name for info in pkgutil.iter_modules(moekit.recipes.__path__) if not info.name.startswith("_"))
TOLERANCE = 0.05

OPTIONS = [
    "--variant", "tiny", "--train.max_steps", "40", "--train.max_minutes", "0", "--train.warmup_steps", "10",
    "--train.seed", "3", "--train.log_every", "1", "--train.validate_every", "20", "--train.accelerator", "cpu",
    "--data.babel_languages", "2", "--data.babel_sentences", "1500", "--data.vocab_size", "800",
    "--data.num_workers", "0", "--data.cache", "cache",
    "--evaluate.max_sentences", "6", "--evaluate.valid_sentences", "20", "--evaluate.samples", "6",
    "--evaluate.beam_size", "2",
]  # fmt: skip
LEARNS_FAST = ["--train.learning_rate", "0.01", "--evaluate.length_penalty", "1"]
"""So that translations are not empty after 40 steps."""
OF_RECIPE = {
    "gshard": ["--data.babel_languages", "4", "--data.babel_sizes", "kmb=600,shl=200"],
    "sparse_translation": [
        "--data.babel_languages", "4", "--data.babel_sizes", "kmb=600,shl=200",
        "--model.dense_steps", "15", "--data.heating_steps", "20",
    ],
}  # fmt: skip
"""Languages whose sizes a recipe sets, and what makes its phases begin within 40 steps."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_computes_what_was_recorded(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    options = [*OPTIONS, *LEARNS_FAST, *OF_RECIPE.get(name, []), "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", f"moekit.recipes.{name}", "run", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = read_folder(tmp_path / "run")
    path = RECORDS / f"{name}.json"
    if request.config.getoption("record_runs"):
        commit = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["commit"]
        write_record(path, {"machine": machine(), "commit": commit, **found})
        return
    assert path.exists(), f"no run of {name} is recorded: run this test once with --record-runs"
    recorded = json.loads(path.read_text(encoding="utf-8"))
    lines = differences(recorded, found, exact=recorded["machine"] == machine(), tolerance=TOLERANCE)
    assert not lines, shown(lines)


def test_every_recipe_has_its_record() -> None:
    recorded = sorted(path.stem for path in RECORDS.glob("*.json"))
    assert recorded == NAMES, "record the run of a new recipe: see the top of this file"
