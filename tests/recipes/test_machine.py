"""What "auto" is on a machine: its accelerator, precision and workers; and what a run keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.runs import RunConfig
from moekit.runs.settings import DataConfig, TrainConfig
from moekit.training.callbacks.memory import PeakMemory
from moekit.training.machine import usable_accelerator
from moekit.training.metrics.perplexity import TokenPerplexity
from moekit.training.metrics.routing import RoutingStatistics


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, bf16: bool = True, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)


@pytest.fixture(autouse=True)
def products() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_apples_mps_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=False, mps=True)
    assert usable_accelerator("auto") == usable_accelerator("cpu") == "cpu"
    with pytest.raises(UserError, match=r"needs a GPU that torch sees.*Apple's MPS, which has no float64.*Say cpu"):
        usable_accelerator("gpu")
    machine(monkeypatch, cuda=False)
    with pytest.raises(UserError, match=r"train.accelerator gpu needs a GPU.*got none. Say cpu"):
        usable_accelerator("gpu")
    machine(monkeypatch, cuda=True)
    assert usable_accelerator("gpu") == "gpu"
    assert usable_accelerator("auto") == "auto"


@pytest.mark.parametrize("metric", [lambda: TokenPerplexity(["text"]), lambda: RoutingStatistics({"a": 2})])
def test_metrics_are_not_moved_to_mps(metric: Any) -> None:
    """What torch says there, without one: the message is ours."""

    def to_mps(tensor: Tensor) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    with pytest.raises(UserError, match=r"needs a device with float64.*got Apple's MPS.*accelerator=.cpu"):
        metric()._apply(to_mps)

    def fails(tensor: Tensor) -> Tensor:
        raise TypeError("something else")

    with pytest.raises(TypeError, match="something else"):
        metric()._apply(fails)


@pytest.mark.parametrize(
    ("options", "accelerator", "wanted"),
    [
        ({"cuda": False}, "auto", ("32-true", 0, "highest")),
        ({"cuda": True}, "auto", ("bf16-mixed", 4, "highest")),
        ({"cuda": True}, "cpu", ("32-true", 0, "highest")),
        ({"cuda": True, "bf16": False}, "gpu", ("32-true", 4, "high")),
    ],
)
def test_what_auto_is(
    options: dict[str, Any], accelerator: Any, wanted: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **options)
    config = RunConfig(train=TrainConfig(accelerator=accelerator))
    found = config.settled()
    assert (found.train.precision, found.data.num_workers, torch.get_float32_matmul_precision()) == wanted
    assert found.settled() == found
    said = RunConfig(train=TrainConfig(accelerator=accelerator, precision="bf16-true")).settled()
    assert said.train.precision == "bf16-true"


def test_a_run_that_goes_on_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun on a GPU and continued on a CPU, or the other way; one from before "auto" said it by name."""
    for cuda, was in ((False, "bf16-mixed"), (True, "32-true")):
        machine(monkeypatch, cuda=cuda)
        assert RunConfig().settled({"train": {"precision": was}}).train.precision == was
    assert torch.get_float32_matmul_precision() == "high"  # float32 by default, on a GPU


def test_workers_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True)
    assert [DataConfig().workers(TrainConfig(devices=n)) for n in (1, 4, 8, 16)] == [4, 2, 0, 0]
    assert DataConfig(num_workers=7).workers(TrainConfig()) == 7
    assert TrainConfig(precision="32-true").usable_precision == "32-true"


def test_peak_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Resident on a CPU, allocated on a GPU; the largest outlives a stop, unless the kind of memory changes."""
    trainer: Any = type("T", (), {"strategy": type("S", (), {"root_device": torch.device("cpu")})})
    callback = PeakMemory(forecast=2**30)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert 50 * 2**20 < callback.bytes < 2**40
    assert callback.forecast == pytest.approx(callback.bytes + 2**30, rel=0.01)
    held = torch.ones(64 * 2**20)
    assert callback.bytes >= held.numel() * 4
    assert callback.text().endswith(f"GiB (forecast {callback.forecast / 2**30:.2f})")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    trainer.strategy.root_device = torch.device("cuda", 0)
    other = PeakMemory()
    other.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert other.state_dict() == {"bytes": 3 * 2**30, "of": "GPU", "forecast": None}
    assert other.text() == "peak 3.00 GiB"
    other.load_state_dict({"bytes": 5 * 2**30, "of": "GPU", "forecast": None})
    assert other.bytes == 5 * 2**30
    other.load_state_dict(callback.state_dict())
    assert other.bytes == 3 * 2**30
