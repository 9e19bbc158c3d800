"""The benchmark of fine-tuning a folder, at toy size: it runs, writes what it says, and refuses wrong results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.mark.slow  # two processes import transformers and Lightning
def test_processes_at_toy_size(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--quick", "--processes", "2", "--json", str(tmp_path / "steps.json")]) == 0
    found = json.loads((tmp_path / "steps.json").read_text())
    names = ["transformers, FSDP2", "moekit, ZeRO 3", "moekit, ZeRO 1", "moekit, ZeRO 0"]
    assert list(found["arms"]) == names
    assert 200 < found["tokens"] <= 256
    first, *_, last = found["losses"][names[0]]
    assert first > last + 1e-6  # it trains
    for name in names:
        assert len(found["losses"][name]) == 2 + found["rounds"]
        assert found["losses"][name] == pytest.approx(found["losses"][names[0]], rel=1e-5)
        arm = found["arms"][name]
        assert arm["wall"]["median_seconds"] * arm["tokens_per_second"] == pytest.approx(found["tokens"])
    assert found["arms"][names[0]]["wall"]["median_ratio"] == 1.0
    assert f"2 x 2 rows of at most 64, {2 * 16752:,} parameters, wall time" in capsys.readouterr().out


def test_rows_of_processes_are_those_of_one(script: ModuleType) -> None:
    whole = script.batch_of(4, 64, 128)
    parts = [script.batch_of(2, 64, 128, rank, 2) for rank in (0, 1)]
    assert [float(part.predictions) for part in parts] == [float(whole.predictions) / 2] * 2
    rows = [row[real].tolist() for batch in parts for row, real in zip(batch.ids, batch.real, strict=True)]
    assert rows == [row[real].tolist() for row, real in zip(whole.ids, whole.real, strict=True)]


def test_arms_that_train_otherwise_are_refused(script: ModuleType) -> None:
    with module_of(FOLDER / "finetune_folder_processes.py") as processes:

        def check(what: str, other: float, floor: float = 1.5) -> None:
            processes.require_equal_steps({what: {processes.FLOOR: [2.0, floor], "other": [2.0, other]}})

        check("loss", 1.5001)
        check("gradient norm", 1.501)
        for wrong in (1.5002, 1.4998, float("nan"), float("inf")):
            with pytest.raises(SystemExit, match=r"loss of step 1 differs: 1.5 of transformers, FSDP2, .* of other"):
                check("loss", wrong)
        with pytest.raises(SystemExit, match="the gradient norm of step 1 differs"):
            check("gradient norm", 1.502)
        with pytest.raises(SystemExit, match="the gradient norm of step 1 differs: inf"):
            check("gradient norm", float("inf"), float("inf"))


def test_a_trainer_stands_still_between_steps(script: ModuleType) -> None:
    with module_of(FOLDER / "finetune_folder_processes.py") as processes:
        seen: list[int] = []

        def fit(stepwise: Any) -> None:
            for number in range(2):
                seen.append(number)
                stepwise.on_train_batch_end(None, None, {"loss": torch.tensor(float(number))}, None, number)
            raise ValueError("after the last")

        stepwise = processes.Stepwise(fit)
        assert seen == []
        stepwise.step()
        assert seen == [0]
        stepwise.step()
        assert seen == [0, 1]
        assert stepwise.record.losses == [0.0, 1.0]
        with pytest.raises(ValueError, match="after the last"):
            stepwise.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3"], "--processes must be 1 or more and divide 8 experts: got 3"),
        (["--processes", "0"], "--processes must be 1 or more and divide 8 experts: got 0"),
        (["--processes", "2", "--threads", "2"], "with one thread each: leave --device and --threads out"),
        (["--processes", "2", "--device", "cuda"], "with one thread each: leave --device and --threads out"),
    ],
)
def test_what_processes_cannot_do_is_refused(
    script: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--quick", *options])
    assert message in capsys.readouterr().err


def test_rounds_are_counted(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--rounds", "0"])
    assert "--rounds: must be 1 or more: got 0" in capsys.readouterr().err


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
