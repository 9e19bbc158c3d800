"""How fast a run computed, from what it left."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moekit.atomic import write_json
from moekit.planner.measure import product_rate
from moekit.recipes import gshard
from moekit.runs.plan import expected
from moekit.runs.speed import speed_of

CONFIG = gshard.RECIPE.variants["tiny"].config


def test_speed_is_arithmetic(tmp_path: Path) -> None:
    write_json(tmp_path / "environment.json", {"product_rate": 2e9})
    plan = expected(gshard.RECIPE, CONFIG)
    assert plan is not None
    work = plan.flops_per_token
    found = speed_of(gshard.RECIPE, CONFIG, tmp_path, {"tokens": 1000, "seconds": 4.0}, 8)
    assert found == {
        "step_seconds": 0.5,
        "flops_per_token": work,
        "flops_per_second": pytest.approx(250 * work),
        "product_rate": 2e9,
        "share": pytest.approx(250 * work / 2e9),
        "forecast_seconds": pytest.approx(1000 * work / 2e9),
    }
    several = CONFIG.changed(train={"devices": 4})
    assert speed_of(gshard.RECIPE, several, tmp_path, {"tokens": 1000, "seconds": 4.0}, 8)["share"] == pytest.approx(
        250 * work / 8e9
    )


@pytest.mark.parametrize("content", [None, {}, {"product_rate": None}, {"product_rate": "fast"}, []])
def test_what_is_not_known_is_none(content: object, tmp_path: Path) -> None:
    if content is not None:
        write_json(tmp_path / "environment.json", content)
    found = speed_of(gshard.RECIPE, CONFIG, tmp_path, {}, 0)
    assert found.pop("flops_per_token") > 0
    assert set(found.values()) == {None}


def test_the_rate_of_this_machine_is_measured_once() -> None:
    before = torch.get_rng_state()
    rate = product_rate("cpu", torch.float32)
    assert 1e8 < rate < 1e14
    assert product_rate("cpu", torch.float32) == rate
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("seconds", "products"), [(0.01, 11), (10.0, 4)])
def test_measuring_a_rate_ends(seconds: float, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third of a second that it may take (9 looks at the clock and 3 a product), or four products."""
    clock = itertools.count()
    monkeypatch.setitem(
        product_rate.__wrapped__.__globals__, "time", SimpleNamespace(perf_counter=lambda: seconds * next(clock))
    )
    made = []
    monkeypatch.setattr(torch, "mm", lambda a, b: made.append(a.shape[0]))
    assert product_rate.__wrapped__("cpu", torch.float32) == pytest.approx(2 * 768**3 / seconds)
    assert made == [768] * len(made)
    assert len(made) == products
