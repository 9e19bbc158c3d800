"""How hypotheses of different lengths are compared: one object per rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LengthPenalty(Protocol):
    """Divides the sum of log-probabilities of a text by a number that depends, monotonically, on its length."""

    def divisor(self, length: Tensor) -> Tensor:
        """Positive Float64 of the shape of `length` Int64 >= 1; rises or falls throughout."""


@dataclass(frozen=True)
class GNMTPenalty:
    """Divides by ((5 + length) / 6) ** alpha; the end token counts.

    Args:
        alpha: 0 = plain sum of log-probabilities; larger favours longer texts.

    Raises:
        ValueError: if `alpha` is not finite.

    Source: arXiv:1609.08144 eq. 14 (alpha 0.6 to 0.7 there), without its coverage term.
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        _require_finite(self)

    def divisor(self, length: Tensor) -> Tensor:
        """((5 + length) / 6) ** alpha."""
        return ((5.0 + length.double()) / 6.0) ** self.alpha


@dataclass(frozen=True)
class MeanLogProb:
    """Divides by length ** alpha; 1 = the mean log-probability of a token, the end token counted.

    Raises:
        ValueError: if `alpha` is not finite.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _require_finite(self)

    def divisor(self, length: Tensor) -> Tensor:
        """Length ** alpha."""
        return length.double() ** self.alpha


def _require_finite(penalty: GNMTPenalty | MeanLogProb) -> None:
    if not math.isfinite(penalty.alpha):
        raise ValueError(f"{type(penalty).__name__}.alpha must be a finite number: got {penalty.alpha}.")


def best_possible(penalty: LengthPenalty, total: Tensor, length: Tensor, limit: Tensor) -> Tensor:
    """The best score that a text with sum `total` after `length` tokens can still reach within `limit` tokens.

    Log-probabilities are at most 0, so the sum cannot rise, and the divisor is monotone: the bound is met at the next
    token or at the last possible one.
    """
    soon = total.double() / penalty.divisor(torch.minimum(length + 1, limit))
    return torch.maximum(soon, total.double() / penalty.divisor(limit))
