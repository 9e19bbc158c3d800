"""The compute-equivalent factor: how much more work a dense model needs to reach a sparse model's loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST_SIZES = 4
"""Dense models of a ladder."""


@dataclass(frozen=True)
class Factor:
    """Work of the dense model with the sparse model's loss, as a multiple of the sparse model's work.

    Attributes:
        value: the factor, or the bound of it.
        bound: "at least" where the sparse model is better than the best of the ladder, "at most" where it is worse than
            the worst, else "". Nothing is extrapolated.
    """

    value: float
    bound: Literal["", "at least", "at most"] = ""


def compute_factor(ladder: Sequence[tuple[float, float]], work: float, loss: float) -> Factor:
    """The factor of one sparse model, by linear interpolation of the ladder's loss in the logarithm of work.

    Losses of a ladder that rise with work, as noise makes them, are pooled first (isotonic regression).

    Args:
        ladder: work and loss of dense models, at least four of different work.
        work: of the sparse model, in the same unit.
        loss: of the sparse model.

    Raises:
        ValueError: there are fewer sizes.

    Example:
        >>> compute_factor([(1, 4.0), (2, 3.0), (4, 2.0), (8, 1.0)], work=1.0, loss=2.5).value  # sqrt(2 * 4)
        2.82842712474619
    """
    if (found := len({size for size, _ in ladder})) < FEWEST_SIZES:
        raise ValueError(f"a ladder needs {FEWEST_SIZES} or more dense models of different work: got {found}.")
    sizes, losses = zip(*sorted(ladder), strict=True)
    falling = _falling(losses)
    if loss < falling[-1]:
        return Factor(sizes[-1] / work, "at least")
    if loss > falling[0]:
        return Factor(sizes[0] / work, "at most")
    for (small, worse), (large, better) in zip(
        zip(sizes, falling, strict=True), zip(sizes[1:], falling[1:], strict=True), strict=False
    ):
        if better <= loss <= worse:
            share = 0.0 if worse == better else (worse - loss) / (worse - better)
            return Factor(math.exp((1 - share) * math.log(small) + share * math.log(large)) / work)
    raise AssertionError("a loss between the first and the last of a falling sequence lies between two neighbours")


def _falling(values: Sequence[float]) -> list[float]:
    """The sequence that never rises and is nearest by squares: neighbours that rise are pooled into their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [value for value, count in pools for _ in range(count)]


def log_factors(found: Mapping[int, Factor], smallest: float) -> list[float]:
    """Logarithms of factors by seed over the smallest one of interest; a bound counts as the factor."""
    return [math.log(factor.value / smallest) for factor in found.values()]


def bounds(found: Mapping[int, Factor]) -> tuple[str, str]:
    """Why factors by seed may be less than they are given, and why they may be more; "" = they are not.

    A factor that is "at most" a bound does not support a claim, and one that is "at least" a bound does not refute it.
    """
    most, least = (sum(one.bound == bound for one in found.values()) for bound in ("at most", "at least"))
    of = f"of {len(found)} seeds the sparse model is"
    return (
        f"in {most} {of} worse than the whole ladder" if most else "",
        f"in {least} {of} better than the whole ladder, whose largest model does not do enough work to tell"
        if least
        else "",
    )


def why_no_measure(sizes: Mapping[str, tuple[float, float]]) -> str:
    """Why a ladder says nothing of work: its largest model is not its best; "" = it is.

    Then the training of the large models fails, and what a sparse model saves cannot be told from that.

    Args:
        sizes: mean work and mean loss of dense models, by name.

    Example:
        >>> why_no_measure({"narrow": (1.0, 1.5), "wide": (2.0, 1.75)})
        'the ladder is no measure of work, as its largest model, wide, loses 1.75, and narrow 1.5'
        >>> why_no_measure({"narrow": (1.0, 1.5), "wide": (2.0, 1.25)})
        ''
    """
    largest, best = max(sizes, key=lambda name: sizes[name][0]), min(sizes, key=lambda name: sizes[name][1])
    if sizes[best][1] == sizes[largest][1]:
        return ""
    lost = {name: f"{sizes[name][1]:.4g}" for name in (largest, best)}
    worse, better = f"its largest model, {largest}, loses {lost[largest]}", f"{best} {lost[best]}"
    return f"the ladder is no measure of work, as {worse}, and {better}"
