"""What training was warned of is among the findings, and every drawing of a report is a figure by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.figure
import pytest
import torch
from fake_runs import make_run, make_text_run
from shown_text import screen, words

import moekit as mk
from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.recipes import switch
from moekit.report import RoutingReport, figure, figure_names, results_markdown, write_report
from moekit.report.health import findings
from moekit.report.reading import read_run
from moekit.report.run import run_view
from moekit.runs import Run
from moekit.training import RoutingMonitor, Thresholds
from moekit.training.monitoring import TrainingWatch


def warn(run: Path, *warnings: dict[str, Any] | Any) -> Path:
    (run / "warnings.json").write_text(json.dumps({"warnings": list(warnings)}), encoding="utf-8")
    return run


def test_warnings_are_findings_of_page_terminal_and_markdown(tmp_path: Path) -> None:
    def drops(step: int, layer: str) -> dict[str, Any]:
        text = f"{layer}: 30.0% of the assignments were dropped [b]"
        return {"step": step, "kind": "drops", "layer": layer, "text": text}

    spike = {"step": 1200, "kind": "loss_spike", "layer": "", "text": "loss 9 of step 1200 is a spike."}
    run = warn(make_run(tmp_path / "run"), drops(100, "encoder.1"), spike, drops(300, "decoder.1"), {"kind": "no"}, 7)
    said = [finding.text for finding in findings(read_run(run)) if not finding.good]
    wanted = [
        "After step 300, decoder.1: 30.0% of the assignments were dropped [b] Training was warned of it 2 times in "
        "encoder.1, decoder.1, first after step 100.",
        "After step 1,200, loss 9 of step 1200 is a spike.",
    ]
    assert [text for text in said if "After step" in text] == wanted
    page = words(write_report(run).read_text(encoding="utf-8"))
    assert all(text in page for text in wanted)
    assert "After step 1,200, loss 9" in results_markdown(run)
    shown = " ".join(screen(run).split())
    assert "After step" in shown or "more such findings" in shown


@pytest.mark.parametrize("damage", ["7", "{", '{"warnings": 3}', '{"warnings": [{"kind": "dead"}]}'])
def test_a_damaged_file_of_warnings_is_none(damage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "warnings.json").write_text(damage, encoding="utf-8")
    assert read_run(run).warned == ()


def test_every_drawing_of_a_page_has_a_name(tmp_path: Path) -> None:
    """All charts and maps that the page shows are known, each by a name of its own, and are drawn."""
    for run in (make_run(tmp_path / "pairs"), make_text_run(tmp_path / "text")):
        folder = read_run(run)
        shown = [x for section in run_view(folder).sections for cell in section.cells for x in cell]
        drawn = [x for x in shown if x.chart is not None or x.heats]
        names = figure_names(run)
        assert names == [x.name for x in drawn]
        assert len(set(names)) == len(names) > 8
        for name in names:
            found = figure(name, folder)
            assert isinstance(found, matplotlib.figure.Figure)
            assert found.axes
    assert figure("load", str(run))._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    cells = {text.get_text() for text in figure("load", Run(run)).axes[0].texts}
    table = next(x for x in drawn if x.name == "load").heats[0]
    assert cells == {text for _, row in table.rows for _, text in row}


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.moe = mk.MoELayer(mk.routers.switch(8, 4), mk.experts.GroupedMLP(4, 8, 16))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        hidden, routing = self.moe(batch)
        return hidden.square().mean() + mk.AuxLosses(load_balance=0.01)(routing)[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_figures_of_a_module_of_ones_own() -> None:
    model, monitor = Model(), RoutingMonitor(Thresholds(max_drop_rate=1.0))
    with pytest.raises(UserError, match="figures of Model need somebody who counts"):
        figure("load", model)
    with pytest.raises(UserError, match="RoutingMonitor has figures after it has counted"):
        figure("load", monitor)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[monitor], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(96, 8), batch_size=32))  # type: ignore[arg-type]
    routing = model.moe(torch.randn(32, 8)).routing
    assert figure_names(model) == figure_names(monitor) == figure_names(routing) == ["load"]
    assert figure_names({0: routing, 1: routing}) == ["load", "drop_rate", "entropy"]
    with pytest.raises(UserError, match=r"Model has no figure 'laod'. Did you mean 'load'\? There is: load"):
        figure("laod", model)
    with pytest.raises(UserError, match="a figure is of a run folder, a Run, or of routings, statistics or a module"):
        figure("load", 3)
    with pytest.raises(UserError, match="A run folder is required"):
        figure("load", "nowhere")
    assert RoutingReport().statistics is None


SMALL = [
    "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=2", "--data.babel_sentences=60",
    "--data.vocab_size=400", "--train.warmup_steps=5", "--train.accelerator=cpu", "--train.log_every=5",
    "--model.capacity_factor=2",
]  # fmt: skip


def test_a_healthy_recipe_is_told_nothing_and_another_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    original = TrainingWatch._look
    monkeypatch.setattr(TrainingWatch, "_look", lambda self, step: (looks.append(step), original(self, step))[1])
    small = [*SMALL, "--data.cache", str(tmp_path / "cache"), "--train.monitor.every=5"]
    out, other = tmp_path / "healthy", tmp_path / "other"
    assert (
        main(switch.RECIPE, ["fit", *small, "--train.monitor.window=20", "--train.max_steps=60", "--out", str(out)])
        == 0
    )
    assert looks == list(range(5, 61, 5))
    assert not (out / "warnings.json").exists()
    assert "step 20:" not in capsys.readouterr().err
    strict = [
        *small, "--train.max_steps=7", "--train.monitor.window=5", "--train.monitor.min_evenness=1",
        "--train.monitor.on_collapse=stop",
    ]  # fmt: skip
    assert main(switch.RECIPE, ["fit", *strict, "--out", str(other)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "step 5: encoder.1: routing has collapsed: expert" in said
    assert "stopped: training stopped after step 5: encoder.1: routing has collapsed" in said
    kept = json.loads((other / "warnings.json").read_text())["warnings"]
    assert {(one["step"], one["kind"]) for one in kept} == {(5, "collapse")}
    assert json.loads((other / "stopped.json").read_text())["step"] == 5
    assert any("routing has collapsed" in finding.text for finding in findings(read_run(other)))
    columns = (other / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/routing/encoder.1/load_max_ratio" in columns
    # It goes on as it is told: what was said before is not said again, and does not stop again.
    assert main(switch.RECIPE, ["fit", *strict, "--out", str(other), "--resume"]) == 0
    assert json.loads((other / "warnings.json").read_text())["warnings"] == kept
    assert not (other / "stopped.json").exists()
