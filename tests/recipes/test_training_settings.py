"""Settings of training that every recipe has: the optimizer, and the gradients of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.recipes import gshard
from moekit.routers import switch
from moekit.runs.settings import TrainConfig
from moekit.training.adafactor import Adafactor
from moekit.training.callbacks.expert_gradients import ScaleExpertGradients

TINY = {
    "model.dim": 16, "model.heads": 2, "model.hidden_dim": 32, "model.num_experts": 4, "data.vocab_size": 400,
    "data.babel_sentences": 200, "data.babel_languages": 2, "data.babel_sizes": "null", "train.max_steps": 2,
    "data.directions": "avl-tnd,tnd-avl", "train.warmup_steps": 1, "train.validate_every": 0,
    "train.accelerator": "cpu", "tasks.translation.tokens": 128,
}  # fmt: skip


def layer() -> MoELayer:
    return MoELayer(switch(8, 4), GroupedMLP(4, 8, 16, bias=True))


def test_adafactor_is_made_with_its_settings() -> None:
    train = TrainConfig(
        optimizer="adafactor", learning_rate=0.01, clip_update=0.1, weight_decay=0.0, expert_lr_multiplier=2.0
    )
    optimizer = train.make_optimizer(layer())
    assert isinstance(optimizer, Adafactor)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (group["lr"], group["batch_dims"], group["clip_update"]) for name, group in groups.items()} == {
        "shared": (0.01, 0, 0.1),
        "expert": (0.02, 1, 0.1),
        "expert_no_decay": (0.02, 1, 0.1),
    }
    unclipped = replace(train, clip_update=0.0).make_optimizer(layer())
    assert unclipped.param_groups[0]["clip_update"] is None


def test_adamw_is_the_default_and_refuses_settings_of_adafactor() -> None:
    assert isinstance(TrainConfig().make_optimizer(layer()), torch.optim.AdamW)
    with pytest.raises(UserError, match=r"clip_update=0.1 is of adafactor. Use --train.optimizer adafactor"):
        TrainConfig(clip_update=0.1).make_optimizer(layer())


@pytest.mark.parametrize("scaled", [True, False])
def test_a_run_scales_the_gradients_of_experts_where_it_is_told_to(
    scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    step = ScaleExpertGradients.on_before_optimizer_step

    def seen(self: Any, trainer: Any, module: Any, optimizer: Any) -> None:
        steps.append(type(optimizer).__name__)
        step(self, trainer, module, optimizer)

    monkeypatch.setattr(ScaleExpertGradients, "on_before_optimizer_step", seen)
    monkeypatch.setattr("moekit.runs.evaluate.evaluate", lambda *given: None)
    given = TINY | {"data.cache": tmp_path / "cache", "train.optimizer": "adafactor"}
    given |= {"train.scale_expert_gradients": scaled}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(gshard.RECIPE, ["fit", *words, "--out", str(tmp_path / "run")]) == 0
    assert steps == (["Adafactor"] * 2 if scaled else [])
