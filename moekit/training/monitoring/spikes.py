"""Spikes: values far above the running median, measured in the running spread."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

LEAST_VALUES = 20
"""Values that are known before the first one is judged."""
_SIGMA = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


@dataclass(frozen=True)
class Spike:
    """A value that is one: the bound that it is above, and median and spread of the `known` values before it."""

    value: float
    bound: float
    median: float
    spread: float
    known: int


class Spikes:
    """Tells spikes of one quantity over the steps of training.

    A value is a spike above ``median + factor * spread``. The spread is the median absolute deviation times 1.4826, at
    least a part of the median: values that hardly move have no spread to be measured in. A spike joins the values too,
    so that a level that stays is the median in the end.

    Args:
        factor: spreads above the median.
        window: values that median and spread are of.
        least: the least spread, as a part of the median.
    """

    def __init__(self, factor: float, window: int, least: float) -> None:
        self.factor, self.least = factor, least
        self.values: deque[float] = deque(maxlen=window)
        self._most = window

    def see(self, value: float) -> Spike | None:
        """Judge a value by those before it, then keep it; what is not finite is neither."""
        if not math.isfinite(value):
            return None
        found = None
        if len(self.values) >= min(LEAST_VALUES, self._most):
            middle = median(self.values)
            spread = max(_SIGMA * median(abs(one - middle) for one in self.values), self.least * abs(middle))
            bound = middle + self.factor * spread
            found = Spike(value, bound, middle, spread, len(self.values)) if value > bound else None
        self.values.append(value)
        return found

    def state(self) -> Any:
        """The values, as plain data."""
        return list(self.values)

    def load(self, state: Any) -> None:
        """Go on with values; of more than the window the last ones."""
        self.values = deque(map(float, state), maxlen=self._most)
