"""The Z-code M3 recipe: published size, FLOP-matched twin, and the life of a run from text to report."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moekit.cli.recipes import main
from moekit.planner.census import parameters
from moekit.recipes import zcode_m3

SMALL = [
    "--data.babel_languages", "2", "--data.babel_sentences", "600", "--data.vocab_size", "700",
    "--data.max_length", "64", "--model.dim", "16",
    "--model.heads", "2", "--model.hidden_dim", "32", "--model.num_experts", "4",
    "--model.generator_dim", "8", "--model.dropout", "0.1",
    "--tasks.translation.tokens", "256", "--tasks.denoising.tokens", "128",
    "--tasks.masked_lm.tokens", "64", "--tasks.replaced_token.tokens", "64",
    "--train.warmup_steps", "2", "--train.log_every", "1", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "6", "--evaluate.valid_sentences", "6", "--evaluate.beam_size", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe-cache")


def recipe(*arguments: str | Path) -> int:
    return main(zcode_m3.RECIPE, [str(a) for a in arguments])


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "moekit.recipes.zcode_m3", *map(str, arguments)]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -- the paper's model ---------------------------------------------------------------------------------------------


def test_paper_variant_has_the_published_size() -> None:
    """10 B parameters (arXiv:2109.10465: 24 + 12 layers, 64 experts, 250k vocabulary), counted by hand and by torch."""
    with torch.device("meta"):
        network = zcode_m3.backbone(zcode_m3.PAPER.model, 250_000)
    d, f, experts = 1024, 4096, 64
    sparse_layers, dense_layers = 18, 18
    matrices = sparse_layers * (experts * 2 * d * f + experts * d) + dense_layers * 2 * d * f
    attention = (24 + 2 * 12) * 4 * d * d
    counted = sum(p.numel() for name, p in network.named_parameters() if "norm" not in name)
    assert counted == 250_000 * d + matrices + attention
    total = sum(p.numel() for p in network.parameters())
    assert total == 10_273_353_728
    assert abs(total / 10e9 - 1) < 0.03
    assert len(network.routed_layers) == sparse_layers


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_dense_twin_is_flop_matched(variant: str) -> None:
    """Dropless, a token of the sparse model passes what it passes in the twin, but for the router's own scores."""
    sparse, dense = zcode_m3.RECIPE.variants[variant].config, zcode_m3.RECIPE.variants[f"{variant}_dense"].config
    flops = []
    ids = torch.randint(45, 200, (2, 32))
    for model in (replace(sparse.model, capacity_factor=0.0), dense.model):
        network = zcode_m3.backbone(model, 200).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.decode(ids, network.encode(ids).hidden)
        flops.append(counter.get_total_flops())
    routers = len(zcode_m3.backbone(sparse.model, 200).routed_layers) * 2 * ids.numel() * sparse.model.dim * 8
    # grouped_mm is a custom operator that the counter does not know: what it computes is counted by hand.
    layers = len(zcode_m3.backbone(sparse.model, 200).routed_layers)
    grouped = layers * 2 * 2 * ids.numel() * sparse.model.dim * sparse.model.hidden_dim
    assert flops[0] + grouped - routers == flops[1]


def test_active_parameters_are_those_of_the_twin_and_the_routers() -> None:
    tiny, twin = zcode_m3.RECIPE.variants["tiny"].config.model, zcode_m3.RECIPE.variants["tiny_dense"].config.model
    sparse = parameters(zcode_m3.backbone(tiny, 300))
    dense = parameters(zcode_m3.backbone(twin, 300))
    assert dense["active"] == dense["total"]
    assert sparse["active"] == dense["total"] + 2 * tiny.num_experts * tiny.dim
    assert sparse["total"] - sparse["active"] == 2 * 7 * 2 * tiny.dim * tiny.hidden_dim


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of a very small model."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code = recipe(
        "run", *SMALL, "--data.cache", cache, "--out", out, "--train.max_steps", "8", "--train.validate_every", "4"
    )
    assert code == 0
    return out


def test_run_leaves_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.csv", "summary.json", "routing.json", "samples.json",
        "report.html", "checkpoints",
    } <= names  # fmt: skip
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["recipe"] == "zcode_m3"
    assert summary["steps"] == 8
    assert summary["tokens"] > 8 * 200
    assert summary["tokens_per_second"] > 0
    assert (
        set(summary["bleu"]["directions"]) == set(summary["data"]["directions"]) == set(summary["chrf"]["directions"])
    )
    assert "|tok:13a|" in summary["bleu"]["signature"]
    assert set(summary["perplexity"]) == {"translation", "denoising", "masked_lm"}
    assert set(summary["loss"]) == {"translation", "denoising", "masked_lm", "replaced_token"}
    assert set(summary["routing"]["layers"]) == {"encoder.1", "decoder.1"}
    routing = json.loads((finished / "routing.json").read_text())
    for layer in routing["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert set(layer["load_by_language"]) == set(routing["languages"])
    rows = metrics(finished)
    assert [int(row["step"]) for row in rows][-1] == 7
    assert {"train/translation/loss", "train/aux/load_balance", "train/routing/drop_rate", "lr"} <= set(rows[0])
    assert "<svg" in (finished / "report.html").read_text()


def test_test_command_gives_the_same_scores(finished: Path) -> None:
    before = json.loads((finished / "summary.json").read_text())
    assert recipe("test", "--out", finished) == 0
    after = json.loads((finished / "summary.json").read_text())
    for key in ("bleu", "chrf", "perplexity", "routing", "steps", "tokens"):
        assert after[key] == before[key]


def test_generate_keeps_the_order_of_lines(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = json.loads((finished / "samples.json").read_text())
    source, target = samples[0]["direction"].split("-")
    same = [sample for sample in samples if sample["direction"] == samples[0]["direction"]]
    file = tmp_path / "in.txt"
    file.write_text("".join(f"{sample['source']}\n\n" for sample in same), encoding="utf-8")
    out = tmp_path / "out.txt"
    assert (
        recipe("generate", "--out", finished, "--from", source, "--to", target, "--input", file, "--output", out) == 0
    )
    lines = out.read_text(encoding="utf-8").split("\n")
    assert lines[0:-1:2] == [sample["hypothesis"] for sample in same]
    assert all(not line for line in lines[1::2])
    assert recipe("generate", "--out", finished, "--from", source, "--to", "xx", "--input", file) == 2
    assert "xx" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_unasked(
    finished: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "summary.json").read_bytes()
    assert recipe("run", *SMALL, "--data.cache", cache, "--out", finished, "--train.max_steps", "8") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (finished / "summary.json").read_bytes() == before


def test_another_configuration_cannot_resume(finished: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = recipe(
        "run", *SMALL, "--data.cache", cache, "--out", finished, "--resume", "--train.max_steps", "8",
        "--train.validate_every", "4", "--model.dim", "24",
    )  # fmt: skip
    assert code == 2
    assert "model.dim" in capsys.readouterr().err


# -- stop and resume -----------------------------------------------------------------------------------------------


def _losses(folder: Path) -> dict[int, str]:
    return {int(row["step"]): row["train/loss"] for row in metrics(folder)}


def _start(arguments: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for_row(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if (folder / "metrics.csv").exists() and any(
            int(row["step"]) >= step for row in metrics(folder) if row["step"]
        ):
            return
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.05)
    raise AssertionError("the run did not come to the step in a minute")


ENDS = ["--train.max_steps", "24", "--train.checkpoint_steps", "4"]


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Losses by step of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert recipe("fit", *SMALL, *ENDS, "--data.cache", cache, "--out", out) == 0
    return _losses(out)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_step_for_step(
    how: signal.Signals, uninterrupted: dict[int, str], cache: Path, tmp_path: Path
) -> None:
    """With dropout, jitter, random token selection and sampled replacements: every loss to the last digit."""
    end, stopped = [*ENDS, "--data.cache", cache], tmp_path / "stopped"
    process = _start(["fit", *SMALL, *end, "--out", stopped])
    _wait_for_row(stopped, 5, process)
    process.send_signal(how)
    code = process.wait(60)
    assert code == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    assert max(_losses(stopped)) < 23
    assert recipe("fit", *SMALL, *end, "--out", stopped, "--resume") == 0
    assert _losses(stopped) == uninterrupted
    assert len(uninterrupted) == 24


# -- bad input -----------------------------------------------------------------------------------------------------


def _corpus(folder: Path, **languages: str | bytes) -> Path:
    folder.mkdir()
    for name, text in languages.items():
        content = text.encode() if isinstance(text, str) else text
        for split in ("train", "valid", "test"):
            (folder / f"{split}.{name}").write_bytes(content)
    return folder


LINES = "".join(f"line {i} of the text\n" for i in range(40))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"en": LINES, "de": LINES + "one more\n"}, ["41", "40"]),
        ({"en": LINES, "de": ""}, [".de", "empty"]),
        ({"en": LINES, "de": LINES.encode() + b"\xff\xfe\n"}, ["UTF-8", "line 41"]),
        ({"en": LINES}, ["en"]),
    ],
)
def test_bad_text(
    files: dict[str, str | bytes], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = _corpus(tmp_path / "text", **files), tmp_path / "run"
    code = recipe(
        "run", *SMALL, "--data.source", "moses", "--data.path", folder, "--out", out, "--data.cache", tmp_path / "c"
    )
    message = capsys.readouterr().err
    assert code == 2
    assert all(word in message for word in words), message
    assert not out.exists()


def test_broken_json_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "json"
    folder.mkdir()
    good = '{"translation": {"en": "a", "de": "b"}}\n'
    (folder / "train.json").write_text(good * 3 + '{"translation": {"en": "a", \n')
    code = recipe("run", *SMALL, "--data.source", "jsonl", "--data.path", folder, "--out", tmp_path / "run")
    message = capsys.readouterr().err
    assert code == 2
    assert "train.json" in message
    assert "4" in message
    assert not (tmp_path / "run").exists()


def test_vocabulary_larger_than_the_text_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = _corpus(tmp_path / "text", en=LINES, de=LINES.replace("text", "Text")), tmp_path / "run"
    arguments = [*SMALL, "--data.vocab_size", "9000", "--data.source", "moses", "--data.path", folder, "--out", out]
    assert recipe("run", *arguments, "--data.cache", tmp_path / "c") == 2
    assert "vocab_size" in capsys.readouterr().err
    assert not out.exists()


def test_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert recipe("run", *SMALL, "--data.cache", blocked / "cache", "--out", tmp_path / "run") == 2
    assert str(blocked) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_needs_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = ["--train.max_steps", "0", "--train.max_minutes", "0"]
    assert recipe("run", *SMALL, *ends, "--out", tmp_path / "run") == 2
    assert "train.max_steps" in capsys.readouterr().err
