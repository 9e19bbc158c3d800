"""Paired differences over seeds: mean, interval, and the p-values of a claim of effect, its contrary and equality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moekit.ablation.student import t_cdf, t_quantile

CONFIDENCE = 0.95
"""Of intervals."""


@dataclass(frozen=True)
class PairedDifferences:
    """Differences, one for each seed.

    Attributes:
        differences: Float[N], at least two.
    """

    differences: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.differences) < 2:
            raise ValueError(f"a paired comparison needs at least two differences: got {len(self.differences)}.")

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.differences)

    @property
    def deviation(self) -> float:
        """Their standard deviation, that of a sample."""
        return statistics.stdev(self.differences)

    @property
    def error(self) -> float:
        """The standard error of the mean; 0 where all are the same number."""
        return self.deviation / math.sqrt(len(self.differences))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Student's t interval of the mean."""
        half = t_quantile((1 + confidence) / 2, len(self.differences) - 1) * self.error
        return self.mean - half, self.mean + half

    def p_above(self, bound: float) -> float:
        """Two-sided p of the mean not being above `bound`: below 0.05 where the 95 % interval lies above it."""
        return min(1.0, 2 * self._upper_tail(bound))

    def p_below(self, bound: float) -> float:
        """The same of the other side."""
        return min(1.0, 2 * (1 - self._upper_tail(bound, at_tie=0.0)))

    def p_equivalent(self, margin: float) -> float:
        """P of the mean not lying within plus and minus `margin`, by two one-sided tests (TOST).

        Source: Schuirmann 1987; below 0.05 where the 90 % interval lies within the margin.
        """
        return max(self._upper_tail(-margin), 1 - self._upper_tail(margin, at_tie=0.0))

    def _upper_tail(self, bound: float, at_tie: float = 1.0) -> float:
        """One-sided p of the mean not being above `bound`; at the bound itself and without spread, `at_tie`."""
        if self.error == 0:
            return at_tie if self.mean == bound else float(self.mean < bound)
        return 1 - t_cdf((self.mean - bound) / self.error, len(self.differences) - 1)


def holm(values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that the chance of any false rejection is what each of them says.

    Source: Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and none is less than a smaller one's.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = least
    return adjusted
