"""Short runs under the Strategy around a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from small_lm import Sentences, sentences, trainer_for, whole_weights
from torch import Tensor, nn

from moekit import ExpertParallelStrategy

REPEATED = sentences(1).repeat(5, 1)  # a plain DataLoader begins anew when training is resumed
OFFLOADED: dict[str, Any] = {"expert_parallel_size": 1, "zero_stage": 1, "offload": "optimizer"}


def train(
    module: L.LightningModule, layout: dict[str, Any], steps: int, place: Any = None, path: Any = None, **options: Any
) -> L.Trainer:
    """Train under the Strategy; a checkpoint of the last step is put to `place`."""
    # Lightning counts an epoch that max_steps has cut short as done, in what is saved after it.
    trainer = trainer_for(ExpertParallelStrategy(**layout), max_steps=steps, **{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=Sentences(REPEATED), ckpt_path=path)
    if place is not None:
        trainer.save_checkpoint(place)
    return trainer


def on_rank_zero(call: Callable[[], Any]) -> None:
    """The others wait, beforehand too: they may still look at what the call changes."""
    dist.barrier()
    if dist.get_rank() == 0:
        call()
    dist.barrier()


def equal(module: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, value in whole_weights(module).items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance / 10, msg=name)
