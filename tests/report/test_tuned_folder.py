"""The report of a fine-tuned folder of transformers: finished or not, beside another one, damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from shown_text import screen, words

from moekit.cli import program
from moekit.report import figure_names, results_markdown, write_report
from moekit.report.health import findings
from moekit.report.predictions import main_task
from moekit.report.reading import read_run

CONFIG = "model: models/olmoe\ndata: {path: chats.jsonl, source: jsonl}\nfine_tune: {rank: 4}\ntrain: {max_steps: 40}\n"
LAYER = "train/routing/model.model.layers.0.mlp"
METRICS = f"""step,epoch,valid/loss,lr,train/loss,train/tokens,train/tokens_per_second,{LAYER}/entropy,{LAYER}/drop_rate
9,0,,0.01,3.0,1000,500,1.0,0.0
19,0,2.5,0.01,2.8,2000,500,1.1,0.0
39,0,,0.01,2.2,4000,600,1.2,0.0
"""
RESULTS = {
    "before": 4.0,
    "parameters": {"total": 2_000_000, "trained": 500_000},
    "after": 2.0,
    "steps": 40,
    "expert_tokens": {"model.layers.0.mlp": [300, 100, 0, 400]},
    "warnings": ["no adapter reaches an expert."],
}


def write(folder: Path, results: Mapping[str, Any] | None = None, *, metrics: str = METRICS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.csv").write_text(metrics)
    command = ["moekit", "finetune", "--model", "models/olmoe", "--out", folder.name, "--overwrite"]
    (folder / "environment.json").write_text(json.dumps({"command": command}))
    (folder / "results.json").write_text(json.dumps(RESULTS if results is None else results))
    return folder


def test_a_finished_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "tuned")
    run = read_run(folder)
    assert run.by_column("valid", "loss")["learned_tokens"].step.tolist() == [0, 19, 40]
    assert run.by_column("valid", "loss")["learned_tokens"].value.tolist() == [4.0, 2.5, 2.0]
    assert run.by_column("train", "loss")["learned_tokens"].value.tolist() == [3.0, 2.8, 2.2]
    (layer,) = run.layers
    assert (layer["name"], layer["entropy"], layer["drop_rate"]) == ("model.layers.0.mlp", 1.2, 0.0)
    found = main_task(run)
    assert (found.loss, found.origin) == (2.0, "held-out")
    assert found.perplexity == pytest.approx(7.389, abs=1e-3)
    page = words(write_report(folder).read_text())
    for said in (
        "olmoe \u00b7 jsonl \u00b7 1 Mixture-of-Experts layer of 4 experts",
        "7.39 held-out text",
        "4 nats per token, before training",
        "500 k 25 % of all parameters",
        "1 dead expert of 4 in 1 layer.",
        "no adapter reaches an expert.",
        "Measured in training, all steps together.",
    ):
        assert said in page, said
    for said in ("Translation", "BLEU", "not finished", "summary.json", "samples"):
        assert said not in page, said
    assert set(figure_names(folder)) >= {"loss/learned_tokens", "learning_rate", "load", "perplexity/learned_tokens"}
    text = screen(folder)
    assert "perplexity 7.39   loss 2   before 4   held-out text" in text
    assert "1 of 4 dead" in text
    assert "tested" not in text
    assert "| Learned tokens | 2 | 7.39 |" in results_markdown(folder)


def test_one_that_learned_nothing_says_so(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, {**RESULTS, "after": 4.25}))
    said = [finding.text for finding in findings(run) if not finding.good]
    assert "The held-out loss did not fall: 4.0000 before training, 4.2500 after it." in said


def test_an_interrupted_one_says_how_it_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "tuned", {"before": 4.0})
    assert "Go on" not in screen(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    page = words(write_report(folder).read_text())
    assert "This fine-tuning is not finished (results.json has no loss after it)" in page
    assert "Not finished after 39 of 40 steps." in page
    assert "Tokens of every expert are counted in results.json, when training has ended." in page
    text = screen(folder)
    assert "moekit finetune --model models/olmoe --out tuned --resume" in text
    assert "perplexity 12.18   loss 2.5   held-out text" in text


def test_two_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = write(tmp_path / "wide"), write(tmp_path / "narrow", {**RESULTS, "after": 2.5})
    (other / "config.yaml").write_text(CONFIG.replace("rank: 4", "rank: 2"))
    out = tmp_path / "both.html"
    assert program.main(["compare", str(first), str(other), "--out", str(out)]) == 0
    text = out.with_suffix(".md").read_text()
    assert "| all text | 7.39 | 12.18 (+4.79) |" in text
    assert "| fine\\_tune.rank | 4 | 2 |" in text
    assert "| Learned tokens loss | 2 | 2.5 |" in text
    assert "different data" not in text
    assert "active parameters |" not in text  # nobody says
    (other / "config.yaml").write_text(CONFIG.replace("chats", "others"))
    assert program.main(["compare", str(first), str(other), "--out", str(out)]) == 0
    assert "These runs used different data" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "results",
    ["", "[]", "{", '{"after": "x", "steps": 3}', '{"after": 1e999, "steps": 3}', '{"expert_tokens": [1]}',
     '{"after": 2.0, "steps": 4, "expert_tokens": {"a": 3, "b": [0, 0], "c": ["x"]}, "warnings": {"a": 1}}'],
)  # fmt: skip
def test_damaged_results_leave_a_report(tmp_path: Path, results: str) -> None:
    folder = write(tmp_path / "tuned")
    (folder / "results.json").write_text(results)
    assert "fine-tuning report" in words(write_report(folder).read_text())
    assert screen(folder)


def test_without_metrics(tmp_path: Path) -> None:
    folder = write(tmp_path / "tuned")
    (folder / "metrics.csv").unlink()
    assert read_run(folder).by_column("valid", "loss")["learned_tokens"].value.tolist() == [4.0, 2.0]
    assert "This run folder has no metrics.csv." in words(write_report(folder).read_text())
