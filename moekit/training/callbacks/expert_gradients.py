"""Larger gradients for experts, before clipping and the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from moekit.training.optimizers import scale_expert_gradients


class ScaleExpertGradients(Callback):
    """Calls `moekit.training.optimizers.scale_expert_gradients` before every optimizer step, and before clipping.

    With gradient accumulation it acts once, on the sum. Read there what the factor does under SGD and under clipping,
    and that under Adam alone it does nothing.

    Args:
        factor: a number, or a function of the number of experts; the default is the square root.

    Source: arXiv:2112.10684 section 3.2.
    """

    def __init__(self, factor: float | Callable[[int], float] = math.sqrt) -> None:
        self.factor = factor

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        scale_expert_gradients(pl_module, self.factor, optimizer=optimizer)
