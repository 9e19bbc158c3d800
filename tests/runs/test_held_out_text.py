"""Runs whose corpus has no text to validate or test on, or some that stands in the training text too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekit.cli.recipes import main
from moekit.recipes import moe_lm, zcode_m3
from moekit.runs.recipe import Recipe

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LINES = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]


def trained(recipe: Recipe, folder: Path, **given: Any) -> tuple[dict[str, Any], Path]:
    options = {
        "variant": "tiny", "model.dim": 16, "data.vocab_size": 312, "data.cache": folder / "cache",
        "train.accelerator": "cpu", "train.max_steps": 2, "train.warmup_steps": 1, "train.max_minutes": 0,
        "train.validate_every": 1, "evaluate.beam_size": 1, "evaluate.valid_sentences": 0, "evaluate.samples": 1,
        "out": folder / "run", **given,
    }  # fmt: skip
    assert main(recipe, ["run", *(f"--{name}={value}" for name, value in options.items())]) == 0
    return json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8")), folder / "run"


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_corpus_without_held_out_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "text" / "en.txt", LINES[:300:15])
    summary, run = trained(moe_lm.RECIPE, tmp_path, **{"data.source": "text", "data.path": tmp_path / "text"})
    remarks = ["No validation text: the last checkpoint is the result.", "No test text: nothing is tested."]
    assert summary["held_out"] == {
        "valid": {"causal_lm": 0}, "test": {"causal_lm": 0}, "repeated": {}, "remarks": remarks
    }  # fmt: skip
    assert (summary["steps"], summary["evaluated_step"], summary["test"], summary["loss"]) == (2, 2, {}, {})
    said, page = capsys.readouterr().out, (run / "report.html").read_text(encoding="utf-8")
    for text in remarks:
        assert said.count(f"! {text}") == 2, "before training and in the summary"
        assert text in page
    for wrong in ("dense", "BLEU", "Not tested yet"):
        assert wrong not in said


def test_one_task_without_validation_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code in ("en", "de"):
        write(tmp_path / "pairs" / f"train.{code}", LINES)
        write(tmp_path / "text" / f"train.{code}", LINES[:250])
        write(tmp_path / "text" / f"valid.{code}", LINES[250:])
    paths = f"{tmp_path / 'pairs'},{tmp_path / 'text'}"
    summary, run = trained(zcode_m3.RECIPE, tmp_path, **{"data.source": "moses,text", "data.path": paths})
    assert "No validation text for translation." in summary["held_out"]["remarks"]
    assert (run / "checkpoints" / "best.ckpt").exists(), "the best by the first task that is validated"
    assert set(summary["loss"]) == {"denoising", "masked_lm", "replaced_token"}
    assert summary["held_out"]["repeated"]["valid"] == {"en": [50, 50], "de": [50, 50]}


def test_test_sentences_that_were_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, lines in {"train": LINES[:200], "valid": LINES[200:240], "test": LINES[190:300]}.items():
        write(tmp_path / "en" / f"{split}.txt", lines)
    summary, run = trained(moe_lm.RECIPE, tmp_path, **{"data.source": "text", "data.path": tmp_path / "en"})
    text = "Test sentences also in the training text: 10 of 110 in en."
    assert summary["held_out"]["repeated"] == {"test": {"en": [10, 110]}}
    assert summary["held_out"]["remarks"] == [text]
    assert f"! {text}" in capsys.readouterr().out
    assert text in (run / "report.html").read_text(encoding="utf-8")
