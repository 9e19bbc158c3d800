"""Settings of small runs for surgery, what is in their checkpoints, and what becomes of them."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit.cli.recipes import main as recipe_main
from moekit.recipes import moe_lm
from moekit.runs import Run
from moekit.runs.surgery.optimizer import optimizer_slots
from moekit.surgery.__main__ import main

E = 4
COMMON = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "64", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "3",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "3", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
]  # fmt: skip
SIZES = [
    "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", str(E),
]  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return Run.load(folder).loaded.weights


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def slots(subject: Run) -> dict[str, dict[str, Any]]:
    found = optimizer_slots(subject)
    assert found is not None
    return found


def losses(folder: Path) -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def resumed(folder: Path, steps: int) -> dict[int, float]:
    """Train on as the command's last line says; losses by step."""
    options = ["--config", str(folder / "config.yaml"), "--out", str(folder), "--resume"]
    assert recipe_main(moe_lm.RECIPE, ["fit", *options, "--train.max_steps", str(steps)]) == 0
    return losses(folder)


def network(subject: Run, config: Any, state: dict[str, Tensor]) -> nn.Module:
    model = subject.model(config, device="cpu")
    model.load_state_dict(state)
    return model.eval()


def fails(arguments: list[str], out: Path, message: str) -> bool:
    """The command ends with code 2 and the message, and leaves nothing."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([*arguments, "--out", str(out)])
    text = said.getvalue()
    assert message in text, text
    assert code == 2
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return True
