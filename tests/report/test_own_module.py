"""Figures and a page on the routing of any LightningModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekit as mk
from moekit.errors import UserError
from moekit.report import RoutingReport, figures
from moekit.testing import JoinedProcesses, run_distributed
from moekit.training.metrics import PieceCounts, RoutingStatistics

D, E = 8, 4


class Own(L.LightningModule):
    """A module of a user's own with two sparse layers, one of them under activation checkpointing."""

    def __init__(self, capacity: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        router = mk.routers.switch(D, E, capacity_factor=capacity)
        self.inner = nn.ModuleList([mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 8))])
        self.moe = mk.MoELayer(mk.routers.TopKRouter(D, 2, k=2), mk.experts.GroupedMLP(2, D, 8))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        hidden, _routing = checkpoint(self.inner[0], batch, use_reentrant=False)
        return (batch + hidden + self.moe(hidden).hidden).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.moe(self.inner[0](batch).hidden)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(report: RoutingReport, folder: Path, model: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    torch.manual_seed(1)
    batches = torch.utils.data.DataLoader(torch.randn(8, 6, D), batch_size=2)  # 4 batches of 12 tokens
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=[report], enable_model_summary=False,
        **quiet, **options,
    )  # fmt: skip
    trainer.fit(model or Own(), batches, batches)
    return trainer


def test_every_training_forward_counts_once(tmp_path: Path) -> None:
    """With gradient accumulation, recomputed activations and validation: 48 tokens, each once by its first router."""
    report, model = RoutingReport(every_n_steps=1), Own()
    trained(report, tmp_path, model, accumulate_grad_batches=2)
    assert report.statistics is not None
    layers = {layer["name"]: layer for layer in report.statistics.compute()["layers"]}
    assert {name: layer["assignments"] for name, layer in layers.items()} == {"inner.0": 48, "moe": 96}
    page = (tmp_path / "routing.html").read_text(encoding="utf-8")
    for told in ("inner.0", "Measured in training", "Drop rate", "Router entropy", "Own"):
        assert told in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "held-out" not in page
    # Hooks are gone.
    assert not any(
        hook for module in model.modules() if isinstance(module, mk.MoELayer) for hook in module._forward_hooks
    )


def test_windows_close_by_optimizer_steps(tmp_path: Path) -> None:
    report = RoutingReport(tmp_path / "new" / "page.html", every_n_steps=3)
    trained(report, tmp_path)
    steps = report._points.series()["train/routing/inner.0/drop_rate"].step.tolist()
    assert steps == [3, 4]  # the rest comes at the end
    assert (tmp_path / "new" / "page.html").exists()


def test_hooks_go_when_training_fails(tmp_path: Path) -> None:
    class Failing(Own):
        def training_step(self, batch: Tensor, number: int) -> Tensor:
            if number == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, number)

    model = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(RoutingReport(), tmp_path, model)
    assert not model.moe._forward_hooks
    assert not (tmp_path / "routing.html").exists()


def test_a_dense_module_is_told(tmp_path: Path) -> None:
    class Dense(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.layer(batch).sum()

        def validation_step(self, batch: Tensor, _: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with pytest.warns(UserWarning, match="no MoELayer"):
        trained(RoutingReport(), tmp_path, Dense())
    assert not (tmp_path / "routing.html").exists()


def on_a_rank(folder: str) -> list[int]:
    report = RoutingReport(every_n_steps=1)
    plugins = [JoinedProcesses()]
    trained(report, Path(folder), devices=dist.get_world_size(), strategy="ddp", plugins=plugins, limit_val_batches=0)
    assert report.statistics is not None
    return [layer["assignments"] for layer in report.statistics.compute()["layers"]]


def test_processes_are_added_up(tmp_path: Path) -> None:
    """Each of two reads half of the batches; one page tells of both."""
    assert run_distributed(on_a_rank, 2, str(tmp_path)) == [[48, 96], [48, 96]]
    assert [path.name for path in tmp_path.glob("*.html")] == ["routing.html"]


def test_figures_of_routings_and_of_statistics() -> None:
    moe = mk.MoELayer(mk.routers.switch(D, E, capacity_factor=0.5), mk.experts.GroupedMLP(E, D, 8))
    steps = {step: {"<first>": moe(torch.randn(64, D)).routing} for step in (1, 5, 9)}
    found = figures(steps)
    assert sorted(found) == ["drop_rate", "entropy", "load"]
    assert all(isinstance(figure, Figure) for figure in found.values())
    (line,) = found["drop_rate"].axes[0].lines
    dropped = [1 - r["<first>"].kept.float().mean().item() for r in steps.values()]
    assert line.get_xdata().tolist() == [1, 5, 9]
    assert line.get_ydata() == pytest.approx(dropped)
    shares = [float(text.get_text()) for text in found["load"].axes[0].texts]
    load = torch.stack([mk.routing_stats(r["<first>"]).load for r in steps.values()]).sum(0)
    assert shares == pytest.approx((load / load.sum() * E).tolist(), abs=0.051)
    assert sorted(figures(moe(torch.randn(64, D)).routing)) == ["load"]
    counted = RoutingStatistics({"a": E})
    counted.update({"a": steps[1]["<first>"]})
    assert sorted(figures(counted)) == ["load"]


@pytest.mark.parametrize("given", [{}, [], "routing", {1: {}, 2: {}}])
def test_what_is_no_routing_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match="figures needs"):
        figures(given)


def test_figures_show_what_experts_like() -> None:
    own, tokens = Own(capacity=8.0), torch.arange(40) % 4
    routing = own.moe(torch.eye(4, D).repeat(10, 1)).routing
    counts = PieceCounts({"layer 0": 2}, vocab_size=4)
    counts.update({"layer 0": routing}, tokens)
    assert "typical" not in figures(routing)
    counts.counts_0.copy_(torch.tensor([[9, 1], [9, 1], [0, 20], [1, 1]]))
    figure = figures(routing, pieces=counts, named="ab$\x07".__getitem__)["typical"]
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "layer 0, expert 0", "a \u00d72.0  b \u00d72.0", "layer 0, expert 1", "$ \u00d71.8",
    ]  # fmt: skip
    figure.canvas.draw()
