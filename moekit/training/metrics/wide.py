"""Metrics whose sums are float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from moekit.errors import UserError


class WideMetric(Metric):
    """A metric with float64 states: float32 sums stop growing after some ten million tokens.

    Raises:
        UserError: when it is moved to a device that has no float64, which is Apple's MPS.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        try:
            return super()._apply(fn, exclude_state)
        except TypeError as error:
            if "MPS" not in str(error):
                raise
            raise UserError(
                f"{type(self).__name__} needs a device with float64, a CPU or a GPU of CUDA or ROCm: got Apple's MPS. "
                'Use Trainer(accelerator="cpu").'
            ) from error
