"""Learning rate schedules: warm-up, then inverse square root, cosine or constant.

They multiply the learning rate of every parameter group, so that an expert multiplier stays what it is. They move once
per optimizer step; in `configure_optimizers` say so with `per_step`. A LightningCLI passes the optimizer and takes
the rest from YAML; `moekit.training.cli.StepCLI` is one that moves them per step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from moekit.errors import UserError
from moekit.training.budget import Budget


class WarmupSchedule(LRScheduler, ABC):
    """Linear warm-up to the peak over `warmup` steps, then `decay`.

    Step n (the first is 0) of the warm-up uses ``(n + 1) / warmup`` of the peak: no step is spent at a rate of 0.

    Args:
        optimizer: its learning rates are the peaks.
        warmup: warm-up steps; 0 = none.

    Raises:
        ValueError: if `warmup` is negative.
    """

    def __init__(self, optimizer: Optimizer, warmup: int) -> None:
        if warmup < 0:
            raise ValueError(f"warmup must be a number of steps, 0 or more: got {warmup}.")
        self.warmup = warmup
        super().__init__(optimizer)

    @abstractmethod
    def decay(self, step: int) -> float:
        """Factor of the peak at `step` >= `warmup`."""

    def factor(self, step: int) -> float:
        """Factor of the peak with which step number `step` (from 0) is made."""
        return (step + 1) / self.warmup if step < self.warmup else self.decay(step)

    def get_lr(self) -> list[float | Tensor]:  # noqa: D102
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain data; its settings are the code's, not the checkpoint's."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": self._last_lr}


class ConstantWithWarmup(WarmupSchedule):
    """Warm-up, then the peak for ever."""

    def __init__(self, optimizer: Optimizer, warmup: int = 0) -> None:
        super().__init__(optimizer, warmup)

    def decay(self, step: int) -> float:  # noqa: D102
        return 1.0


class InverseSquareRoot(WarmupSchedule):
    """Warm-up, then ``sqrt(warmup / (n + 1))`` of the peak at step n: the schedule of the Transformer.

    Without warm-up it is ``1 / sqrt(n + 1)``. Needs no end, which suits runs whose length is not known.

    Source: arXiv:1706.03762 section 5.3.  Differs: the peak is the optimizer's learning rate, not ``dim ** -0.5``.
    """

    def decay(self, step: int) -> float:  # noqa: D102
        return math.sqrt(max(self.warmup, 1) / (step + 1))


class Cosine(WarmupSchedule):
    """Warm-up, then half a cosine from the peak down to `minimum` of it at the end of the budget.

    With p the part of the budget used since the warm-up ended, the factor is
    ``minimum + (1 - minimum) * (1 + cos(pi * p)) / 2``.

    Args: as of `WarmupSchedule`; `budget`, steps or a `Budget` of steps and minutes, which the `MaxMinutes` callback
    must share; and `minimum`, the last factor.

    Raises:
        UserError: if the warm-up does not fit into the steps.
        ValueError: if `minimum` is not in 0..1.

    Source: arXiv:1608.03983 eq. 5, one cycle; the warm-up is ours.
    """

    def __init__(self, optimizer: Optimizer, budget: int | Budget, warmup: int = 0, minimum: float = 0.0) -> None:
        self.budget = budget if isinstance(budget, Budget) else Budget(max_steps=budget)
        if self.budget.max_steps is not None and warmup >= self.budget.max_steps:
            raise UserError(
                f"the warm-up must be shorter than the run: got {warmup} of {self.budget.max_steps} steps. Lower the "
                "warm-up steps or train longer."
            )
        if not 0 <= minimum <= 1:
            raise ValueError(f"minimum must be a part of the peak in 0..1: got {minimum}.")
        self.minimum = minimum
        self._warmup_fraction: float | None = None
        super().__init__(optimizer, warmup)

    def decay(self, step: int) -> float:  # noqa: D102
        if self.budget.max_minutes is None:
            assert self.budget.max_steps is not None
            used = (step - self.warmup) / (self.budget.max_steps - self.warmup)
        else:
            # How much of the minutes the warm-up took is known when it ends, and kept from then on.
            fraction = self.budget.fraction(step)
            if self._warmup_fraction is None:
                self._warmup_fraction = fraction
            used = (fraction - self._warmup_fraction) / max(1 - self._warmup_fraction, 1e-9)
        return self.minimum + (1 - self.minimum) * (1 + math.cos(math.pi * min(max(used, 0.0), 1.0))) / 2

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return super().state_dict() | {"_warmup_fraction": self._warmup_fraction}


def per_step(optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    """What `configure_optimizers` returns for a schedule that moves once per optimizer step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
