"""The benchmark of a training step, at toy size: it runs, writes what it says, and refuses wrong results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_module import module_of
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    with module_of(FOLDER / "train_step.py") as module:
        yield module


@pytest.mark.slow  # transformers' model is imported and profiled
def test_at_toy_size(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert script.main(["--quick", "--threads", threads, "--json", str(tmp_path / "step.json")]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert list(found["arms"]) == ["dense twin", "moekit", "transformers"]
    for arm in found["arms"].values():
        assert 0 < arm["products"] <= arm["products_and_attention"] < 1
        assert arm["peak_bytes"] > 0
    # Of equal active work: the twin lacks the routers, and capacity rounds up.
    flops = {name: arm["flops"] for name, arm in found["arms"].items()}
    assert flops["dense twin"] < flops["moekit"] < 1.5 * flops["dense twin"]
    assert found["arms"]["dense twin"]["processor"]["median_ratio"] == 1.0
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert "times as many tokens per second" in capsys.readouterr().out


def test_what_is_not_equal_is_refused(script: ModuleType) -> None:
    model = nn.Linear(3, 1)
    x = torch.ones(1, 3)
    script.require_equal(model, lambda: model(x).sum(), lambda: (x @ model.weight.t() + model.bias).sum(), 1e-5)
    with pytest.raises(SystemExit, match="refusing to report"):
        script.require_equal(model, lambda: model(x).sum(), lambda: 1.01 * model(x).sum(), 1e-5)
