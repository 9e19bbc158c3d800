"""Making thousands of noisy points fit to draw: smoothing, thinning, sensible limits, specialisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moekit.report.run_folder import Series

MAX_POINTS = 1000


def smoothing_window(num_points: int) -> int:
    """Points averaged for a smooth line: a fiftieth of the series, at least 1 and odd."""
    return max(1, num_points // 50) // 2 * 2 + 1


def smooth(series: Series) -> Series:
    """Centred moving average over `smoothing_window` points; shorter at both ends, NaN and infinities left out."""
    series = series.finite
    window = smoothing_window(len(series.value))
    if window == 1:
        return series
    at, half = np.arange(len(series.value)), window // 2
    points = np.minimum(at + half + 1, len(at)) - np.maximum(at - half, 0)
    return Series(series.step, _sums(np.pad(series.value, half), window) / points)


def _sums(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Sums of every `window` values side by side, from sums of 1, 2, 4, ... values.

    Differences of running sums would be quicker, and nothing after one enormous value.
    """
    length = len(values) - window + 1
    total, at, size = np.zeros(length), 0, 1
    while size <= window:
        if window & size:
            total += values[at : at + length]
            at += size
        values = values[:-size] + values[size:]
        size *= 2
    return total


def thin(series: Series, max_points: int = MAX_POINTS) -> Series:
    """At most about `max_points` points: the least and the greatest of each stretch, so that no spike is lost."""
    if len(series.value) <= max_points:
        return series
    pieces = np.array_split(np.arange(len(series.value)), max_points // 2)
    value = series.value
    picked = {int(p[f(value[p])]) for p in pieces for f in (np.argmin, np.argmax)}
    chosen = np.array(sorted(picked | {0, len(value) - 1}))
    return Series(series.step[chosen], value[chosen])


def limits(values: NDArray[np.float64], *, start_at_zero: bool = False) -> tuple[float, float]:
    """Axis limits with a margin; equal values and an empty series get a span too."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    low = min(low, 0.0) if start_at_zero else low
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = 0.5 * abs(high) or 0.5
        return (0.0 if start_at_zero else low - margin), high + margin
    margin = 0.05 * (high - low)
    return (low if start_at_zero else low - margin), high + margin


def milestones(series: Sequence[Series], count: int = 8) -> list[float]:
    """About `count` of the steps in `series`, evenly spread, the first and the last among them."""
    steps = np.unique(np.concatenate([s.step for s in series])) if series else np.array([])
    if len(steps) <= count:
        return [float(s) for s in steps]
    return [float(steps[i]) for i in np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))]


def specialisation(shares: Sequence[Sequence[float]]) -> float | None:
    """How much the language tells about the expert, from 0 (nothing) to 1 (everything it could).

    Mutual information between a language (all equally likely) and the expert its tokens are sent to, divided by its
    largest possible value log(min(languages, experts)).

    Args:
        shares: for every language the share of its tokens at each expert; each row sums to 1.

    Returns:
        The number, or None where there are fewer than two languages or experts.
    """
    table = np.array([row for row in shares if len(row)], dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        return None
    mean = np.broadcast_to(table.mean(0), table.shape)
    seen = table > 0
    information = np.sum(table[seen] * np.log(table[seen] / mean[seen])) / len(table)
    return float(np.clip(information / np.log(min(table.shape)), 0.0, 1.0))
