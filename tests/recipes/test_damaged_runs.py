"""Damage and full disks from the command line: one line, exit code 2, and what was good stays."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.cli.program import main as program
from moekit.cli.program import surgery
from moekit.cli.recipes import main
from moekit.parallel import verify_checkpoint
from moekit.recipes import gshard
from moekit.runs import Run

SMALL = {
    "model.dim": 16, "model.heads": 2, "model.hidden_dim": 32, "model.num_experts": 4, "data.vocab_size": 400,
    "data.babel_sentences": 200, "data.babel_languages": 2, "data.babel_sizes": "null",
    "data.directions": "avl-tnd,tnd-avl", "data.max_length": 64, "train.max_steps": 2, "train.warmup_steps": 1,
    "train.log_every": 1, "train.validate_every": 0, "train.checkpoint_steps": 1, "train.accelerator": "cpu",
    "tasks.translation.tokens": 128, "evaluate.beam_size": 1, "evaluate.max_sentences": 2,
    "evaluate.valid_sentences": 2, "evaluate.samples": 1,
}  # fmt: skip


def fit(out: Path, cache: Path, *more: str) -> int:
    given = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return main(gshard.RECIPE, ["fit", *given, "--data.cache", str(cache), "--out", str(out), *more])


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, and with a trained run, `base`."""
    folder = tmp_path_factory.mktemp("room")
    assert fit(folder / "base", folder / "cache") == 0
    return folder


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(bytes(data))


def in_a_tensor(path: Path) -> int:
    """A byte in the middle of the token table."""
    table = torch.load(path, weights_only=True)["state_dict"]["backbone.embedding.weight"]
    place = path.read_bytes().index(table.numpy().tobytes())
    return place + table.nbytes // 2


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error; it is all that was said on standard error, but for what is trained."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "{run}/config.yaml", "--out", "{run}", "--resume", "--train.max_steps", "3"],
        ["test", "--out", "{run}"],
        ["generate", "--out", "{run}", "--from", "avl", "--to", "tnd", "--input", "{run}/config.yaml"],
        ["finetune", "--init_from", "{run}", "--out", "{run}-new", "--train.max_steps", "3"],
        ["distill", "--teacher", "{run}", "--out", "{run}-new", "--train.max_steps", "3"],
        ["surgery", "inspect", "{run}"],
        ["surgery", "export", "{run}", "--out", "{run}-new"],
        ["surgery", "prune", "{run}", "--keep", "2", "--out", "{run}-new"],
    ],
    ids=lambda given: " ".join(given[:2]) if given[0] == "surgery" else given[0],
)
def test_a_flipped_bit_of_a_checkpoint_is_refused_by_all_who_read_it(
    arguments: Sequence[str], room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(room / "base", run)
    last = run / "checkpoints" / "last.ckpt"
    flip(last, in_a_tensor(last))
    capsys.readouterr()
    given = [word.format(run=run) for word in arguments]
    code = surgery(given[1:]) if given[0] == "surgery" else main(gshard.RECIPE, given)
    assert code == 2
    line = error_of(capsys)
    assert line.startswith(f"error: The checkpoint {last} cannot be read (it is not as it was written in its record ")
    assert not (tmp_path / "run-new").exists()
    assert not (run / "summary.json").exists()


def test_text_and_tokenizer_of_a_run_are_refused_and_not_made_anew(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("held_out.json.gz", "tokenizer/tokenizer.model"):
        run = tmp_path / name.partition(".")[0]
        shutil.copytree(room / "base", run)
        flip(run / name, (run / name).stat().st_size // 2)
        damaged = (run / name).read_bytes()
        capsys.readouterr()
        assert main(gshard.RECIPE, ["test", "--out", str(run)]) == 2
        assert str(run / name) in error_of(capsys)
        assert (run / name).read_bytes() == damaged


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["the second checkpoint", "events of TensorBoard", "metrics"])
def test_a_disk_that_fills_in_training_leaves_the_last_checkpoint_and_names_it(
    what: str, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    out, saving = tmp_path / "run", torch.save
    last = out / "checkpoints" / "last.ckpt"

    def save(content: Any, file: Any) -> None:
        if last.exists() and what == "the second checkpoint":
            file.write(b"half")
            full()
        saving(content, file)
        if what == "events of TensorBoard":
            monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        if what == "metrics":
            (out / "metrics.csv").unlink(missing_ok=True)
            (out / "metrics.csv").mkdir()

    monkeypatch.setattr(torch, "save", save)
    capsys.readouterr()
    assert fit(out, room / "cache") == 2
    line = error_of(capsys)
    assert line.startswith("error: cannot write ")
    assert ("the disk is full" in line) != (what == "metrics")
    assert f"{last} is whole. Resume with: " in line
    verify_checkpoint(last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"], "no draft is left"


def test_what_is_in_the_place_of_folders_is_named(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tensorboard", "checkpoints", "tokenizer"):
        run = tmp_path / name
        shutil.copytree(room / "base", run, ignore=shutil.ignore_patterns(name))
        (run / name).write_text("")
        capsys.readouterr()
        assert fit(run, room / "cache", "--resume", "--train.max_steps", "3") == 2
        line = error_of(capsys)
        assert str(run / name) in line or f"{name} in the folder {run}" in line
        assert ("in the place of" in line) != (name == "tokenizer")


def test_a_run_whose_checkpoint_is_a_link_to_nothing_does_not_begin_anew(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(room / "base", run)
    last = run / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to(tmp_path / "elsewhere.ckpt")
    capsys.readouterr()
    assert fit(run, room / "cache", "--resume", "--train.max_steps", "3") == 2
    assert "it is a link to" in error_of(capsys)
    assert Run.open(run).summary is None


def test_paths_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("x" * 300)
    assert program(["report", str(long)]) == 2
    assert error_of(capsys) == (
        f"error: cannot use {long}: the name is longer than the system allows; choose a shorter one."
    )

    def closed(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", closed)
    for command in (["report", "a"], ["inspect", "a"], ["test", "--out", "a"]):
        assert program(command) == 2
        assert "cannot use a" in error_of(capsys)
