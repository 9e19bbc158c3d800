"""Every command that takes a folder says of a wrong one what it is and what to do, before it does anything."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from small_folder import MIXED, lines, write_small_folder

from moekit.cli.program import main
from moekit.folders import FolderConfig
from moekit.folders.tuned import TunedFolder

TEXT = ["--data.path", "mixed.jsonl", "--length", "40"]
TAKES_BOTH = {
    "inspect": ["inspect", "WRONG", *TEXT],
    "inspect without text": ["inspect", "WRONG"],
    "prune": ["prune", "WRONG", "--keep", "2", "--by", "reap", *TEXT, "--out", "out"],
    "merge": ["merge", "WRONG", "--out", "out"],
    "upcycle": ["upcycle", "WRONG", "--experts", "2", "--out", "out"],
    "curve": ["curve", "WRONG", *TEXT, "--out", "out"],
}
TAKES_MODELS = {
    "finetune": ["finetune", "--model", "WRONG", "--data.path", "mixed.jsonl", "--out", "out"],
    "plan": ["plan", "--model", "WRONG", "--devices", "2"],
}
TAKES_RUNS = {
    "test": ["test", "./WRONG"],
    "generate": ["generate", "./WRONG", "--input", "mixed.jsonl"],
    "score": ["score", "./WRONG"],
    "serve": ["serve", "./WRONG"],
    "routing": ["routing", "./WRONG"],
    "test of a recipe": ["test", "switch", "--out", "WRONG"],
    "export": ["export", "WRONG", "--out", "out"],
    "aggregate": ["aggregate", "WRONG", "WRONG", "--out", "out"],
    "change": ["change", "WRONG", "--set", "model.k=1", "--out", "out"],
    "split": ["split", "WRONG", "--parts", "2", "--out", "out"],
    "finetune of a recipe": ["finetune", "switch", "--init_from", "WRONG", "--out", "out"],
}
SHOWS_BOTH = {"report": ["report", "WRONG"], "compare": ["compare", "WRONG", "WRONG"]}
"""Runs, and fine-tunings of folders."""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that are none of a model, or broken ones."""
    place = tmp_path_factory.mktemp("wrong")
    write_small_folder(place / "base")
    lines(place / "mixed.jsonl", MIXED)
    (place / "empty").mkdir()
    for name in ("nothing.json", "cut", "mute", "headless", "other", "unsized", "headed"):
        shutil.copytree(place / "base", place / name)
    (place / "nothing.json" / "config.json").unlink()
    weights = (place / "cut" / "model.safetensors").read_bytes()
    (place / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for file in (place / "mute").glob("*token*"):
        file.unlink()
    (place / "headless" / "config.json").write_text("{")
    config = json.loads((place / "base" / "config.json").read_text())
    (place / "other" / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    (place / "unsized" / "config.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    (place / "headed" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    for name in ("tuned", "adapted", "begun"):
        TunedFolder(place / name).create(FolderConfig(model="base"), overwrite=False)
    shutil.copytree(place / "base", place / "tuned" / "model")
    (place / "adapted" / "adapter").mkdir()
    (place / "adapted" / "adapter" / "adapter_config.json").write_text("{}")
    return place


def refused(arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of a wrong folder, in one line, once it has been refused."""
    assert main([argument.replace("WRONG", wrong) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, shown.err
    assert not Path("out").exists()
    return shown.err


@pytest.mark.parametrize("name", [*TAKES_BOTH, *TAKES_MODELS])
def test_what_is_no_model(
    name: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    arguments = {**TAKES_BOTH, **TAKES_MODELS}[name]
    reads_text = "--data.path" in arguments
    for wrong, said in {
        "nowhere": "nowhere must be .*: there is nothing",
        "empty": "empty must be .*: it is empty",
        "nothing.json": "nothing.json must be",
        "cut": "no sparse model that Olmoe"
        if name == "upcycle"
        else "model.safetensors must be a whole safetensors file",
        "headless": "config.json is no configuration that transformers knows",
        "other": "config.json is no configuration that transformers knows.*unheard_of",
        "unsized": "config.json is no configuration that transformers knows: .*expected int, got str",
        "headed": "config.json (describes no OlmoeForCausalLM|is no configuration)",
        "tuned": "it is of a fine-tuning, whose model is in tuned/model. Give tuned/model",
        "adapted": "it is of a fine-tuning that wrote adapters alone.*--resume --merge",
        "begun": "it is of a fine-tuning that wrote no model yet.*--resume",
        "adapted/adapter": "it has adapters for PEFT",
        "mixed.jsonl": "mixed.jsonl",
        **({"mute": "must have a tokenizer, by which text is read: it has none of"} if reads_text else {}),
    }.items():
        shown = refused(arguments, wrong, capsys)
        if name in TAKES_MODELS:
            shown = shown.replace(f"{room}/", "")
        assert re.search(said, shown), (wrong, shown)


@pytest.mark.parametrize("name", [*TAKES_RUNS, *SHOWS_BOTH])
def test_what_is_no_run(
    name: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    for wrong, said in {
        **({"tuned": "of a fine-tun"} if name in TAKES_RUNS else {}),
        "base": "base",
        "empty": "empty",
        "nowhere": "nowhere",
    }.items():
        assert re.search(said, refused({**TAKES_RUNS, **SHOWS_BOTH}[name], wrong, capsys)), wrong


def test_a_fine_tuning_that_has_not_begun_is_shown(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(room / "begun", tmp_path / "begun")
    assert main(["report", "begun"]) == 0
    assert "report      begun/report.html" in capsys.readouterr().out
    assert "No held-out loss was measured yet." in (tmp_path / "begun" / "report.html").read_text()
    assert main(["compare", "begun", str(room / "tuned")]) == 0
    assert (tmp_path / "comparison.md").is_file()


def test_a_run_is_not_put_over_a_fine_tuning(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    for how in ("--resume", "--overwrite"):
        assert main(["run", "switch", "--out", "tuned", how]) == 2
        assert "no config.yaml of a run" in " ".join(capsys.readouterr().err.split())
    assert (room / "tuned" / "model" / "config.json").is_file()
