"""``generate`` of a recipe with experts on disk: the same text, in the order of the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moekit.cli.recipes import main
from moekit.inference import complete
from moekit.recipes import moe_lm

OPTIONS = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "32", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "2",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "0", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
    "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", "4",
]  # fmt: skip


LISTS = ["--evaluate.beam_size", "3", "--n_best", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    options = [*OPTIONS, "--data.cache", str(folder / "cache"), "--out", str(folder / "run")]
    assert main(moe_lm.RECIPE, ["fit", *options]) == 0
    return folder / "run"


def written(run: Path, file: Path, *options: str) -> str:
    out = file.with_suffix(".out")
    given = ["generate", "--out", str(run), "--from", "avl", "--input", str(file), "--output", str(out)]
    assert main(moe_lm.RECIPE, [*given, *options]) == 0
    return out.read_text()


def test_the_same_text_with_experts_on_disk(run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("ba\n\nto na ri ba\nx\nto na\n")
    whole = written(run, prompts)
    assert whole.count("\n") == 5
    assert len(set(whole.splitlines())) > 1
    assert written(run, prompts, "--experts_in_memory", "1") == whole


def test_n_best_lists(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("ba\n\nto na ri\n")
    best = written(run, prompts, "--evaluate.beam_size", "3").splitlines()
    listed = [line.split(" ||| ") for line in written(run, prompts, *LISTS).splitlines()]
    assert [number for number, _, _ in listed] == ["0", "0", "0", "1", "1", "1", "2", "2", "2"]
    assert [text for _, text, _ in listed[::3]] == best
    scores = [float(score) for _, _, score in listed]
    assert all(scores[i : i + 3] == sorted(scores[i : i + 3], reverse=True) for i in (0, 3, 6))
    assert len(set(scores)) > 3
    single = written(run, prompts, "--evaluate.beam_size", "1", "--n_best", "1").splitlines()
    assert [line.split(" ||| ")[0] for line in single] == ["0", "1", "2"]
    for wanted in ("4", "0"):
        given = ["generate", "--out", str(run), "--from", "avl", "--input", str(prompts), *LISTS[:2]]
        assert main(moe_lm.RECIPE, [*given, "--n_best", wanted]) == 2
        assert f"must be from 1 to the width of the beam: got {wanted} and evaluate.beam" in capsys.readouterr().err


def test_batches_are_bounded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("ba\n" * 9 + "to na ri\n" * 3)
    shapes: list[tuple[int, int]] = []

    def noted(model: Any, ids: Any, **options: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return complete(model, ids, **options)

    monkeypatch.setattr("moekit.inference.completer.complete", noted)
    for options in (["--evaluate.beam_size", "1"], ["--evaluate.beam_size", "3"], ["--temperature", "1"]):
        whole = written(run, prompts, *options)
        assert len(shapes) == 2, "prompts of two lengths"
        shapes.clear()
        assert written(run, prompts, *options, "--evaluate.batch_tokens", "10") == whole
        assert sum(rows for rows, _ in shapes) == 12
        assert all(rows == 1 or rows * length <= 10 for rows, length in shapes)
        assert len(shapes) > 4
        shapes.clear()


def test_what_it_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("ba\n")
    given = ["generate", "--out", str(run), "--from", "avl", "--input", str(prompts), "--experts_in_memory"]
    assert main(moe_lm.RECIPE, [*given, "0", "--to", "tnd"]) == 2
    assert "continues text in the language of --from. Leave --to out." in capsys.readouterr().err
    assert main(moe_lm.RECIPE, [*given, "-1"]) == 2
    assert "must be at least 0, which means all: got -1" in capsys.readouterr().err
    checkpoint = run / "checkpoints" / "last.ckpt"
    kept = checkpoint.rename(tmp_path / "last.ckpt")
    try:
        assert main(moe_lm.RECIPE, [*given, "2"]) == 2
        assert "holds no checkpoint" in capsys.readouterr().err
    finally:
        kept.rename(checkpoint)
