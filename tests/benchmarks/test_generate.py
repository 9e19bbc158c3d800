"""The benchmark of generation, at toy size: it runs, writes what it says, and counts the products of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_module import module_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    with module_of(FOLDER / "generate.py") as module:
        yield module


@pytest.mark.slow  # transformers' model is imported, exported and profiled
def test_at_toy_size(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert script.main(["--quick", "--threads", threads, "--json", str(tmp_path / "speed.json")]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    for beams in ("beams 1", "beams 4"):
        assert found["speed"][beams]["lower_scores"] == 0
        arms = found["speed"][beams]["arms"]
        assert list(arms) == ["products alone", "moekit", "transformers"]
        assert all(arm["peak_megabytes"] >= 0 and arm["teraflops"] > 0 for arm in arms.values())
        assert arms["moekit"]["processor"]["median_ratio"] == 1.0
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert "none of moekit's scores lower" in capsys.readouterr().out


def test_products_are_those_of_the_run(script: ModuleType) -> None:
    """Counted by hand for the text that greedy search writes: every token is projected once, every row scored once."""
    size = script.SIZES["tiny"]
    model = script.build(size).eval()
    script.give_languages(model, size)
    products = script.Products(model, lambda: script.ours(model, size, 1))
    # Queries, keys and values of a layer, its output and its feed-forward, which is as large with experts as without.
    own, wide = 4 * size.dim**2, 2 * size.dim * size.hidden
    read, written = size.sentences * size.length, size.sentences * size.length
    real = int(script.sentences(size, None)[1].sum())  # padding is not routed
    dense, sparse = size.layers - size.layers // 2, size.layers // 2
    encoder = read * (size.layers * own + dense * wide) + real * sparse * wide
    cross = size.layers * 2 * size.dim**2 * (read + written)
    decoder = written * (size.layers * (own + wide) + size.dim * size.vocab)
    assert products.flops == 2 * (encoder + cross + decoder)
    products()


def test_parts_are_those_of_the_run(script: ModuleType) -> None:
    """Every part is timed, none twice, and the model is as before."""
    size = script.SIZES["tiny"]
    model = script.build(size).eval()
    script.give_languages(model, size)
    before = script.ours(model, size, 1)
    found = script.parts(model, lambda: script.ours(model, size, 1), rounds=1)
    assert {"encoder", "experts", "routers", "logits", "search", "norms", "self-attention"} <= set(found)
    assert min(found.values()) >= 0
    assert not any(module._forward_hooks for module in model.modules())
    assert "logits" not in model.__dict__
    assert torch.equal(script.ours(model, size, 1), before)
