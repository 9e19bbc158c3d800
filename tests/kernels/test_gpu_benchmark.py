"""The script for a GPU runs to its end on a CPU, and a fault in one part costs no other part its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from script_module import module_of

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    with module_of(SCRIPT) as module:
        monkeypatch.setattr(module, "product_rate", lambda device, dtype: 1e12)
        yield module


def test_every_part_at_toy_size(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    assert script.main(["--toy", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(script.PARTS) <= set(found)
    assert found["environment"]["packages"]["torch"]
    for row in found["layer"]:
        assert {"dense", "torch", "grouped_mm"} <= set(row["arms"])
        assert set(row["left_out"]) >= {"triton", "scattermoe", "sonicmoe"}
        assert row["arms"]["dense"]["over_dense"] == 1.0
    assert set(found["step"][0]["tokens_per_second"]) == {"torch", "dense"}


def test_an_arm_with_other_results_gets_no_number_and_a_broken_part_no_other(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> Any:
        arm = script.by_backend("torch")(*arguments)
        return script.Arm(lambda x: 1.5 * arm.run(x), arm.weights)

    def broken(options: Any) -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(script.ARMS, "grouped_mm", wrong)
    monkeypatch.setitem(script.PARTS, "kernels", broken)
    monkeypatch.setattr(script, "TOY", script.TOY[:1])
    file = tmp_path / "toy.json"
    assert script.main(["--toy", "--parts", "kernels", "layer", "--json", str(file)]) == 1
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["kernels"] == [{"row": 1}, {"failed": "RuntimeError: out of memory"}]
    assert "its results are not torch's: off by 5.0e-01" in found["layer"][0]["left_out"]["grouped_mm"]
    assert "grouped_mm" not in found["layer"][0]["arms"]


def test_a_part_ends_with_its_time(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    assert script.main(["--toy", "--parts", "layer", "--seconds", "1e-9", "--json", str(file)]) == 0
    assert "cut" in json.loads(file.read_text(encoding="utf-8"))["layer"][1]


def test_real_sizes_need_a_gpu(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([])
    assert "give --toy" in capsys.readouterr().err
