"""`generate` with experts over processes: to the letter what one process writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generate_program import RUNS, WAYS, write

from moekit.cli.recipes import main
from moekit.inference.sampling import Sampling
from moekit.recipes import moe_lm, zcode_m3
from moekit.runs import spread
from moekit.runs.generate import generate
from moekit.runs.run import Run
from moekit.runs.writer import Writer, Written

SIZES = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "24", "--train.max_steps", "2", "--train.warmup_steps", "1", "--train.validate_every", "0",
    "--train.accelerator", "cpu", "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4",
    "--evaluate.samples", "0", "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8",
    "--model.num_experts", "4",
]  # fmt: skip
TASKS = {
    moe_lm: ["--tasks.causal_lm.tokens", "128"],
    zcode_m3: [
        "--tasks.translation.tokens", "128", "--tasks.denoising.tokens", "0", "--tasks.masked_lm.tokens", "0",
        "--tasks.replaced_token.tokens", "0",
    ],
}  # fmt: skip
PROMPTS = "ba\n\nto na ri ba so ke\nx\nto na\nba ke to ri ba so ke na\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts").write_text(PROMPTS)
    for recipe, tasks in TASKS.items():
        options = [*SIZES, *tasks, "--data.cache", str(folder / "cache"), "--out", str(folder / recipe.RECIPE.name)]
        assert main(recipe.RECIPE, ["fit", *options]) == 0
    return folder


def texts(folder: Path, devices: int) -> dict[str, str]:
    """What was written by so many processes, by run and way."""
    return {f"{name}-{way}": (folder / f"{name}-{way}-{devices}").read_text() for name in RUNS for way in WAYS}


@pytest.mark.slow  # starts two processes
def test_two_processes_write_what_one_writes(folder: Path) -> None:
    program = Path(__file__).with_name("generate_program.py")
    done = subprocess.run([sys.executable, str(program), str(folder), "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    write(folder, 1)
    alone, together = texts(folder, 1), texts(folder, 2)
    for name, text in alone.items():
        assert together[name] == text, name
        lines = text.splitlines()
        assert len(lines) == {"moe_lm-beam": 12, "zcode_m3-beam": 11}.get(name, 6)  # nothing is one translation
        assert len(set(lines)) > 2, name
    assert set(json.loads((folder / "held").read_text())) == {2}  # of four: the experts were divided
    assert len({len(line) for line in alone["moe_lm-sampling"].splitlines()}) > 2


COMMAND = [sys.executable, "-m", "moekit.recipes.moe_lm", "generate", "--from", "avl"]


@pytest.mark.slow  # starts two processes, twice
def test_the_command_writes_once_and_ends_with_any_process(folder: Path) -> None:
    run = folder / "moe_lm"
    command = [*COMMAND, "--out", str(run), "--devices", "2"]
    done = subprocess.run(command, input=PROMPTS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    alone = folder / "alone"
    generate(Run.open(run), "avl", input=str(folder / "prompts"), output=str(alone))
    assert done.stdout == alone.read_text()

    program = str(Path(__file__).with_name("killed_generation.py"))
    killed = subprocess.run(
        [sys.executable, program, *command[3:]], input=PROMPTS, capture_output=True, text=True, timeout=200
    )
    assert (killed.returncode, killed.stdout) == (1, ""), killed.stderr
    said = " ".join(killed.stderr.split())
    assert re.search(r"rank 1 \(process \d+\) has ended with code -9, and the others cannot write without it", said)


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", "--out", str(folder / "moe_lm"), "--from", "avl", "--input", str(folder / "prompts")]
    for options, message in (
        (["--devices", "2", "--experts_in_memory", "1"], "--experts_in_memory is for one process: got --devices"),
        (["--top_k", "3"], "--top_k is for drawing tokens: got it without --temperature"),
        (["--temperature", "0"], "Sampling.temperature must be positive: got 0.0"),
        (["--temperature", ".inf"], "Sampling.temperature must be a finite number above 0: got inf"),
        (["--temperature", ".nan"], "Sampling.temperature must be a finite number above 0: got nan"),
        (["--temperature", "1", "--n_best", "2", "--evaluate.beam_size", "2"], "--n_best must be 1 where tokens"),
    ):
        assert main(moe_lm.RECIPE, [*given, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_drawn_text_follows_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(*more: str) -> str:
        given = ["generate", "--out", str(folder / "moe_lm"), "--from", "avl", "--input", str(folder / "prompts")]
        assert main(moe_lm.RECIPE, [*given, *more]) == 0
        return capsys.readouterr().out

    assert drawn("--temperature", "1", "--seed", "1") == drawn("--temperature", "1", "--seed", "1")
    assert drawn("--temperature", "1", "--seed", "1") != drawn("--temperature", "1", "--seed", "2")
    assert drawn("--temperature", "1", "--top_k", "1") == drawn("--evaluate.beam_size", "1")


@pytest.mark.parametrize("name", list(RUNS))
def test_drawn_text_follows_the_lines_alone(folder: Path, name: str) -> None:
    """Neither the batches nor the lines after it change what is drawn for a line; one that comes again is another."""
    run, lines = Run.open(folder / name), [*["to na"] * 5, "ba", *["to na"] * 3]

    def drawn(lines: list[str], batch_tokens: int) -> list[str]:
        config = run.config.changed(evaluate={"batch_tokens": batch_tokens})
        return Writer(run, config, sampling=Sampling(1.3, seed=5)).write(lines, "avl", RUNS[name]).texts

    whole = drawn(lines, 4096)
    assert drawn(lines, 8) == drawn(lines, 1) == whole
    assert drawn(lines[:7], 8) == whole[:7]
    assert len({text for text, line in zip(whole, lines, strict=True) if line == "to na"}) == 8


def test_processes_draw_by_the_seed_of_the_first(folder: Path) -> None:
    run, sent = Run.open(folder / "moe_lm"), []

    def broadcast(given: tuple[list[str], Sampling], source: int) -> tuple[list[str], Sampling]:
        sent.append(given[1])
        return ["x"], Sampling(1.3, seed=5)  # what the first one sent

    writer = Writer(run, sampling=Sampling(1.3))
    writing = spread._Writing(writer, ["y"], lambda lines: Written([f"{lines} {writer.sampling}"], []))
    strategy = SimpleNamespace(broadcast=broadcast)
    trainer: Any = SimpleNamespace(strategy=strategy)
    writing.trainer = trainer
    writing.predict_step(None, 0)
    assert writing.written == Written([f"['x'] {Sampling(1.3, seed=5)}"], [])
    assert sent[0] == Sampling(1.3, seed=sent[0].seed)
    assert sent[0].seed is not None


def test_the_model_of_a_writer_stays_where_a_strategy_takes_it(folder: Path) -> None:
    run = Run.open(folder / "moe_lm")
    writer = Writer(run, run.config.changed(train={"devices": 2}))
    assert {p.device for p in writer.model.parameters()} == {torch.device("cpu")}
