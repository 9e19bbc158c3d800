"""Spikes: values far above the running median, measured in the running spread, and above what was seen before."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

LEAST_VALUES = 20
"""Values that are known before the first one is judged."""
MOST_IN_A_ROW = 10
"""Values in a row that can be spikes: more would be a level. After so many steps that are left out training ends."""
_SIGMA = 1.4826  # standard deviations of a normal distribution in a median absolute deviation


@dataclass(frozen=True)
class Spike:
    """A value that is one.

    Attributes:
        value: what was judged.
        bound: what it is above.
        median: that of the `known` values before it.
        spread: that of the same values.
        known: number of values that median and spread are of.
        largest: the largest value before it, if that is what the bound is of.
    """

    value: float
    bound: float
    median: float
    spread: float
    known: int
    largest: float | None = None


class Spikes:
    """Tells spikes of one quantity over the steps of training.

    A value is a spike above ``median + factor * spread`` that is also above ``largest + spread``. The spread is the
    median absolute deviation times 1.4826, at least a part of the median: values that hardly move have no spread to be
    measured in. The largest is that of twice as many values, but not of the last nine: text of several kinds has now
    and then a batch whose loss is far above the others', and it comes back, while training that goes wrong does so for
    steps on end. A spike joins the values too, so that a level that stays is no spike in the end.

    Args:
        factor: spreads above the median.
        window: values that median and spread are of.
        least: the least spread, as a part of the median.
    """

    def __init__(self, factor: float, window: int, least: float) -> None:
        self.factor, self.least = factor, least
        self.values: deque[float] = deque(maxlen=2 * window)
        self._window = window

    def see(self, value: float) -> Spike | None:
        """Judge a value by those before it, then keep it; what is not finite is neither."""
        if not math.isfinite(value):
            return None
        found = None
        if len(self.values) >= min(LEAST_VALUES, self._window):
            recent = [*islice(self.values, max(0, len(self.values) - self._window), None)]
            middle = median(recent)
            spread = max(_SIGMA * median(abs(one - middle) for one in recent), self.least * abs(middle))
            bound = middle + self.factor * spread
            if value > bound:
                before = islice(self.values, max(0, len(self.values) - MOST_IN_A_ROW + 1))
                largest = max(before, default=-math.inf)
                if largest + spread <= bound:
                    found = Spike(value, bound, middle, spread, len(recent))
                elif value > largest + spread:
                    found = Spike(value, largest + spread, middle, spread, len(recent), largest)
        self.values.append(value)
        return found

    def state(self) -> Any:
        """The values, as plain data."""
        return list(self.values)

    def load(self, state: Any) -> None:
        """Go on with values; of more than are kept the last ones."""
        self.values = deque(map(float, state), maxlen=2 * self._window)
