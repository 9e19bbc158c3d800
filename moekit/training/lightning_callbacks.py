"""What Lightning's own callbacks need to work on divided weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

from moekit.parallel.sharding import sharded


def divide_averages(callbacks: Iterable[Callback], divide: Callable[[nn.Module], Any]) -> None:
    """Lay the copies that weight-averaging callbacks made of the model over the ranks as it is."""
    for callback in callbacks:
        average: Any = None
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
        elif isinstance(callback, StochasticWeightAveraging):
            average = callback._average_model
        if average is not None and sharded(average) is None:
            divide(average)
