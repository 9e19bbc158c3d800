"""The papers' routing algorithms as literal loops over tokens, from their pseudo-code: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Decisions:
    """What a loop decided, by (token, choice); and the balance loss as the paper writes it."""

    expert: dict[tuple[int, int], int] = field(default_factory=dict)
    place: dict[tuple[int, int], int] = field(default_factory=dict)
    kept: dict[tuple[int, int], bool] = field(default_factory=dict)
    weight: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    balance: Tensor = field(default_factory=lambda: torch.zeros(()))

    def output(self, values: Tensor) -> Tensor:
        """Sum over kept assignments of weight * values[token, expert]: its gradient tells all weights."""
        total = torch.zeros((), dtype=values.dtype)
        for key, kept in self.kept.items():
            if kept:
                total = total + self.weight[key] * values[key[0], self.expert[key]]
        return total


def softmax(x: Tensor, router: Tensor) -> Tensor:
    scores = torch.stack([(x * row).sum() for row in router])
    return scores.exp() / scores.exp().sum()


def best(probs: Tensor, k: int) -> list[int]:
    return sorted(range(probs.numel()), key=lambda e: -probs[e].item())[:k]


def switch_loop(x: Tensor, router: Tensor, factor: float, order: Sequence[int], real: set[int]) -> Decisions:
    """arXiv:2101.03961 section 2: the most probable expert, capacity, and the loss of eq. 4-6 without alpha.

    Args:
        x: tokens.
        router: one row of scores' weights per expert.
        factor: capacity = factor * tokens / experts.
        order: who is served first: the order of tokens, or a random one (random token selection, arXiv:2109.10465).
        real: which tokens are no padding.
    """
    t, e = x.shape[0], router.shape[0]
    capacity = max(4, math.ceil(factor * t / e))
    probs = [softmax(x[s], router) for s in range(t)]
    result, counter = Decisions(), [0] * e
    for s in order:
        if s not in real:
            continue
        (expert,) = best(probs[s], 1)
        result.expert[s, 0], result.weight[s, 0] = expert, probs[s][expert]
        result.place[s, 0], result.kept[s, 0] = counter[expert], counter[expert] < capacity
        counter[expert] += 1
    for n in range(e):
        mean = sum((probs[s][n] for s in real), torch.zeros((), dtype=x.dtype)) / len(real)
        result.balance = result.balance + e * counter[n] / len(real) * mean
    return result


def gshard_loop(
    x: Tensor,
    router: Tensor,
    factor: float,
    order: Sequence[int],
    real: set[int],
    uniform: Tensor,
    threshold: float = 0.5,
) -> Decisions:
    """arXiv:2006.16668 Algorithm 1: two experts, the second sent if weight / threshold > uniform draw.

    The threshold 0.5 is the paper's ``2 * g2 > U(0, 1)``; 0.2 is ST-MoE's (arXiv:2202.08906 appendix C). A second
    choice that is not sent takes no place. The loss is the paper's, E**2 times smaller than Switch's.

    Args:
        x: tokens.
        router: one row of scores' weights per expert.
        factor: capacity = factor * 2 * tokens / experts.
        order: who is served first inside a choice.
        real: which tokens are no padding.
        uniform: a draw in [0, 1) for every token.
        threshold: see above.
    """
    t, e = x.shape[0], router.shape[0]
    capacity = max(4, math.ceil(factor * 2 * t / e))
    probs = [softmax(x[s], router) for s in range(t)]
    tokens = [s for s in order if s in real]
    result, counter = Decisions(), [0] * e
    for s in tokens:
        first, second = best(probs[s], 2)
        result.expert[s, 0] = first
        result.weight[s, 0] = probs[s][first] / (probs[s][first] + probs[s][second])
        result.place[s, 0], result.kept[s, 0] = counter[first], counter[first] < capacity
        counter[first] += 1  # also where there was no room
    for n in range(e):
        mean = sum((probs[s][n] for s in tokens), torch.zeros((), dtype=x.dtype)) / len(tokens)
        result.balance = result.balance + counter[n] / len(tokens) * mean / e
    for s in tokens:
        first, second = best(probs[s], 2)
        weight = probs[s][second] / (probs[s][first] + probs[s][second])
        result.expert[s, 1], result.weight[s, 1] = second, weight
        if min(1.0, weight.item() / threshold) > uniform[s].item():
            result.place[s, 1], result.kept[s, 1] = counter[second], counter[second] < capacity
            counter[second] += 1
        else:
            result.place[s, 1], result.kept[s, 1] = -1, False
    return result
