"""A LightningCLI whose schedules move once per optimizer step."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI
from torch.optim import Optimizer

from moekit.training.schedules import WarmupSchedule, per_step


class StepCLI(LightningCLI):
    """`LightningCLI`, except that moekit's schedules move per optimizer step instead of per epoch.

    For example ``--lr_scheduler InverseSquareRoot --lr_scheduler.warmup 4000``, or in YAML with
    ``class_path: moekit.training.schedules.Cosine``.
    """

    @staticmethod
    def configure_optimizers(
        lightning_module: L.LightningModule, optimizer: Optimizer, lr_scheduler: Any = None
    ) -> Any:
        """The optimizer, and its schedule at the right interval."""
        if isinstance(lr_scheduler, WarmupSchedule):
            return per_step(optimizer, lr_scheduler)
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
