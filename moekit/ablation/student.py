"""Student's t distribution: its distribution function and quantiles, without a library of statistics."""

from __future__ import annotations

import math

_STEPS = 200
_TINY = 1e-300


def t_cdf(t: float, df: float) -> float:
    """The probability that a t variable with `df` degrees of freedom is at most `t`.

    Example:
        >>> round(t_cdf(2.776445, 4), 6)
        0.975

    Source: P(T <= t) = 1 - I_x(df / 2, 1 / 2) / 2 with x = df / (df + t^2) for t >= 0.
    """
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    tail = _incomplete_beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def t_quantile(p: float, df: float) -> float:
    """The value below which a t variable lies with probability `p`, for 0 < p < 1.

    Example:
        >>> round(t_quantile(0.975, 4), 4)
        2.7764
    """
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return middle


def _incomplete_beta(x: float, y: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction; y is 1 - x to all its digits."""
    if 0.0 in (x, y):
        return float(y == 0.0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - _incomplete_beta(y, x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _STEPS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
