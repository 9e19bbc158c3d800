"""The benchmark of fine-tuning a folder, at toy size: it runs, writes what it says, and refuses wrong results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_module import module_of
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.0", reason="adoption is of transformers 5")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    with module_of(FOLDER / "finetune_folder.py") as module:
        yield module


@pytest.mark.slow  # transformers is imported, and computes experts one after the other on a CPU
def test_at_toy_size(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    assert script.main(["--quick", "--threads", threads, "--json", str(tmp_path / "steps.json")]) == 0
    found = json.loads((tmp_path / "steps.json").read_text())
    assert list(found["arms"]) == ["transformers", "moekit"]
    for arm in found["arms"].values():
        assert arm["tokens_per_second"] == pytest.approx(found["tokens"] * arm["steps_per_second"])
    assert found["arms"]["transformers"]["processor"]["median_ratio"] == 1.0
    assert 100 < found["tokens"] <= 128
    assert "steps/s" in capsys.readouterr().out


def test_what_is_not_one_function_is_refused(script: ModuleType) -> None:
    one, other, x = nn.Linear(3, 1), nn.Linear(3, 1), torch.ones(1, 3)
    for layer in (one, other):
        nn.init.constant_(layer.weight, 0.5)
        nn.init.constant_(layer.bias, 5.0)

    def check(loss: Callable[[], Tensor]) -> None:
        script.require_equal([one, other], [lambda: one(x).sum(), loss], 1e-5)

    check(lambda: other(x).sum())
    with pytest.raises(SystemExit, match="losses differ"):
        check(lambda: 1.01 * other(x).sum())
    with pytest.raises(SystemExit, match="gradients of weight differ"):
        check(lambda: other(2 * x).sum() - 1.5)
    with pytest.raises(SystemExit, match="other parameters have gradients"):
        check(lambda: (x @ other.weight.t()).sum() + 5.0)
