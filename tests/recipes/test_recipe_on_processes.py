"""A recipe on several processes: the same training as on one, from the command line."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.recipes import main
from moekit.recipes import hash_layers, zcode_m3

# Without a limit on experts' slots and without noise nothing depends on which process holds a token.
SETTINGS = [
    "--train.max_steps", "3", "--train.max_minutes", "0", "--train.log_every", "1", "--train.validate_every", "1",
    "--train.warmup_steps", "1", "--model.capacity_factor", "0", "--model.jitter", "0", "--model.load_balance", "0",
    "--data.babel_sentences", "400", "--data.vocab_size", "600", "--model.dim", "32", "--model.hidden_dim", "64",
    "--tasks.masked_lm.tokens", "0", "--tasks.replaced_token.tokens", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def losses(out: Path, cache: Path, *more: str, command: str = "fit") -> list[float]:
    """Validation losses of a run: on one process in this one, on several by a command of its own."""
    given = [command, *SETTINGS, *more, "--out", str(out), "--data.cache", str(cache)]
    if "--devices" in more:
        program = [sys.executable, "-m", "moekit.recipes.zcode_m3"]
        done = subprocess.run([*program, *given], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert command != "fit" or done.stdout.count("trained; test it with") == 1, done.stdout
    else:
        assert main(zcode_m3.RECIPE, given) == 0
    with (out / "metrics.csv").open() as file:
        return [float(row["valid/translation/loss"]) for row in csv.DictReader(file) if row["valid/translation/loss"]]


def tokens(translation: int, denoising: int) -> list[str]:
    return ["--tasks.translation.tokens", str(translation), "--tasks.denoising.tokens", str(denoising)]


def test_two_processes_train_as_one_does(tmp_path: Path, cache: Path) -> None:
    one = losses(tmp_path / "one", cache, *tokens(512, 256))
    two = losses(
        tmp_path / "two", cache, *tokens(256, 128), "--devices", "2", "--strategy.expert_parallel_size", "2",
        "--strategy.zero_stage", "3",
    )  # fmt: skip
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_weights_drawn_block_by_block(tmp_path: Path, cache: Path) -> None:
    found = losses(tmp_path / "run", cache, *tokens(256, 64), "--devices", "2", "--strategy.empty_init", "true")
    assert found[-1] < found[0]


@pytest.mark.slow
def test_a_student_on_two_processes_learns_as_on_one(tmp_path: Path, cache: Path) -> None:
    losses(tmp_path / "teacher", cache, *tokens(256, 128))
    given = ["--teacher", str(tmp_path / "teacher"), "--model.encoder_layers", "1", "--model.decoder_layers", "1"]
    given += ["--model.every", "1", "--distill.inherit", "everything", "--evaluate.max_sentences", "2"]
    one = losses(tmp_path / "one", cache, *given, *tokens(512, 256), command="distill")
    layout = ["--devices", "2", "--strategy.expert_parallel_size", "2", "--strategy.zero_stage", "3"]
    two = losses(tmp_path / "two", cache, *given, *tokens(256, 128), *layout, command="distill")
    assert two == pytest.approx(one, rel=1e-5)


def test_a_layout_that_does_not_fit_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SETTINGS, "--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    for devices, size, message in (("2", "3", "must divide the number of processes"), ("3", "3", "the axis 'expert'")):
        layout = ["--devices", devices, "--strategy.expert_parallel_size", size]
        assert main(zcode_m3.RECIPE, ["fit", *given, *layout]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tables_of_text_need_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data.cache", str(tmp_path / "cache"), "--data.babel_sentences", "200", "--data.vocab_size", "400"]
    given += ["--devices", "2", "--strategy.empty_init", "true", "--out", str(tmp_path / "run")]
    assert main(hash_layers.RECIPE, ["fit", *given]) == 2
    assert "strategy.empty_init needs a model whose weights are drawn" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def written(out: Path) -> list[dict[str, float]]:
    """Scores of the answers written in each validation."""
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    scored = [{k: float(v) for k, v in row.items() if k.startswith(("valid/bleu", "valid/chrf")) and v} for row in rows]
    return [scores for scores in scored if scores]


SCORED = [
    "--evaluate.score_valid", "5", "--train.best", "valid/chrf", "--data.babel_languages", "2",
    "--train.learning_rate", "1e-4",
]  # fmt: skip
LAYOUTS = [
    ["--strategy.expert_parallel_size", "2", "--strategy.zero_stage", "3"],
    pytest.param(["--strategy.tensor_parallel_size", "2"], marks=pytest.mark.slow),
    pytest.param([], marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run on one process with five sentences of a direction translated in validation: long, short and no texts."""
    out = tmp_path_factory.mktemp("scored") / "one"
    losses(out, cache, *tokens(512, 0), *SCORED)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["experts and ZeRO", "tensors", "copies"])
def test_processes_write_together_what_one_writes(tmp_path: Path, cache: Path, scored: Path, layout: list[str]) -> None:
    readers = 1 if "--strategy.tensor_parallel_size" in layout else 2
    losses(tmp_path / "two", cache, *tokens(512 // readers, 0), "--devices", "2", *SCORED, *layout)
    one, two = written(scored), written(tmp_path / "two")
    assert len(one) == 3
    assert max(scores["valid/chrf/average"] for scores in one) > 0.1
    assert two == [pytest.approx(scores, rel=1e-6) for scores in one]
    assert (tmp_path / "two" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_processes_stop_together_when_patience_ends_and_go_on_with_more(tmp_path: Path, cache: Path) -> None:
    """Without a learning rate nothing is ever better than in the first validation."""
    more = [
        *tokens(256, 0), *SCORED, "--train.learning_rate", "0", "--train.max_steps", "9", "--devices", "2",
        "--strategy.expert_parallel_size", "2",
    ]  # fmt: skip
    assert len(losses(tmp_path / "run", cache, *more, "--train.patience", "2")) == 3
    assert len(losses(tmp_path / "run", cache, *more, "--train.patience", "3", "--resume")) == 4
