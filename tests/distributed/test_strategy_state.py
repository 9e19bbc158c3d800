"""What outlives a step under the Strategy: averages of weights, checkpoints by Lightning's callbacks, and both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from case_group import folder, outcome_in, require_success
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from small_lm import (
    CLIP,
    GLOBAL_BATCH,
    LAYOUTS,
    Sentences,
    SmallLM,
    fit,
    one_process,
    sentences,
    trainer_for,
    whole_weights,
)
from torch import nn

from moekit import ExpertParallelStrategy

DATA = sentences(3)
REPEATED = sentences(1).repeat(5, 1)  # a plain DataLoader begins anew when training is resumed


def weight_averaging() -> None:
    """Lightning's EMA callback, on divided weights, with validation between."""
    data, decay = DATA, 0.6
    module = SmallLM("sgd")
    optimizer = module.configure_optimizers()
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    for number, ids in enumerate(data.split(GLOBAL_BATCH)):
        optimizer.zero_grad()
        module.loss(ids).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        for name, p in module.named_parameters():
            average[name] = p.detach().clone() if number == 0 else decay * average[name] + (1 - decay) * p.detach()
    for layout in LAYOUTS:
        other = SmallLM("sgd")
        fit(other, ExpertParallelStrategy(**layout), data, callbacks=[EMAWeightAveraging(decay=decay)])
        for name, value in whole_weights(other).items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def resuming() -> None:
    """Three steps, a checkpoint by Lightning's callback, two more steps: as if there had been no break."""
    data = REPEATED
    layouts = (*LAYOUTS, {"expert_parallel_size": 1, "zero_stage": 2, "offload": "optimizer"})
    expected = one_process(SmallLM(), data)
    for first, second, asynchronous in zip(layouts, (*layouts[1:], layouts[0]), (False, True) * 2, strict=True):
        place = folder()
        saver = ModelCheckpoint(place, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        strategy = ExpertParallelStrategy(**first, asynchronous_save=asynchronous)
        trainer_for(
            strategy, callbacks=[saver, LearningRateMonitor()], max_steps=3, enable_checkpointing=True, logger=True,
            default_root_dir=place,
        ).fit(SmallLM(), datamodule=Sentences(data))  # fmt: skip
        dist.barrier()
        assert sorted(p.name for p in place.glob("step=*")) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
        resumed = SmallLM()
        trainer = trainer_for(ExpertParallelStrategy(**second), max_steps=5)
        trainer.fit(resumed, datamodule=Sentences(data), ckpt_path=place / "step=3.ckpt")
        assert trainer.global_step == 5
        for name, value in whole_weights(resumed).items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=1e-5, atol=1e-6, msg=name)


def averages_in_checkpoints() -> None:
    """A checkpoint of averaged weights holds both; resuming goes on with both."""
    data, place = REPEATED, folder()

    def train(layout: dict[str, Any], steps: int, saver: Any = None, path: Any = None) -> Any:
        module = SmallLM("sgd")
        callbacks = [EMAWeightAveraging(decay=0.6), *([saver] if saver else [])]
        trainer = trainer_for(
            ExpertParallelStrategy(**layout), callbacks=callbacks, max_steps=steps, enable_checkpointing=bool(saver)
        )
        trainer.fit(module, datamodule=Sentences(data), ckpt_path=path)
        return whole_weights(module)

    expected = train(LAYOUTS[0], 5)
    train(LAYOUTS[0], 3, ModelCheckpoint(place, filename="{step}", every_n_train_steps=3))
    for name, value in train(LAYOUTS[1], 5, path=place / "step=3.ckpt").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case for case in (weight_averaging, resuming, averages_in_checkpoints)
}

outcome = outcome_in(__name__, 2)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, outcome: list[dict[str, str]]) -> None:
    require_success(name, outcome)
