"""Small trained runs, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import COMMON, SIZES

from moekit.cli.recipes import main as recipe_main
from moekit.recipes import moe_lm, shazeer


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs one, two (another start), dense (the twin) and wide (another dimension)."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*COMMON, "--data.cache", str(folder / "cache")]
    for name, options in (
        ("one", SIZES),
        ("two", [*SIZES, "--train.seed", "2", "--train.max_steps", "2"]),
        ("dense", [*SIZES[:-1], "0"]),
        ("wide", [*SIZES, "--model.dim", "32", "--train.max_steps", "2"]),
    ):
        assert recipe_main(moe_lm.RECIPE, ["fit", *common, *options, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="session")
def fine_grained(runs: Path) -> Path:
    """A run of a recipe in which k is a setting."""
    options = [*COMMON, "--data.cache", str(runs / "cache"), "--model.dim", "16", "--model.hidden_dim", "8"]
    options += ["--model.num_experts", "6", "--model.k", "2", "--out", str(runs / "fine")]
    assert recipe_main(shazeer.RECIPE, ["fit", *options]) == 0
    return runs / "fine"
