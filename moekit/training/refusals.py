"""What cannot be right on divided weights, refused by name before training."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    pass


def check_optimizer(optimizer: Optimizer) -> None:
    pass
