"""Balanced assignment as an operator: compiled by numba where that is installed, else its twin in torch.

Numba is the optional extra ``fast``. Both solve the same problem exactly (`moekit.functional.balanced_assignment`); of
several optimal assignments they may choose different ones. On the CPU: scores from an accelerator come to it and the
experts go back. The first call compiles, which takes seconds; the result is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.functional.balanced_assignment import balanced_assignment as balanced_assignment_reference
from moekit.functional.balanced_assignment import check_scores, finite_scores, score_bits

Whole = NDArray[np.int64]
Small = NDArray[np.int32]

_FAR = 1 << 62
# Raising prices stops after so many looks at each token: by then it gains less than the search for chains.
_LOOKS = 8


def balanced_assignment(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Assign each token to one expert, loads differing by at most one, the sum of scores maximal.

    Args:
        scores: Float[T, E].
        mask: Bool[T], real tokens; None = all are.

    Returns:
        Int64[T], -1 where masked. No gradient. Stands in a compiled graph as one operator.

    Raises:
        ValueError: if the shapes do not fit.

    Source: arXiv:2103.16716 (assignment during training). Differs: see `moekit.functional.balanced_assignment`, of
        which this is the fast form.
    """
    check_scores(scores, mask)
    return _balanced_assignment(scores.detach(), mask)


@torch.library.custom_op("moekit::balanced_assignment", mutates_args=())
def _balanced_assignment(scores: Tensor, mask: Tensor | None) -> Tensor:
    if not has_numba():
        return balanced_assignment_reference(scores, mask)
    values, real = scores, mask
    if scores.device.type != "cpu":
        # One copy brings both to the host.
        packed = scores if mask is None else torch.cat([scores, mask[:, None].to(scores.dtype)], dim=1)
        values = packed.cpu()  # host read: the solver runs there
        if mask is not None:
            values, real = values[:, :-1], values[:, -1] > 0
    if real is None:
        out = torch.from_numpy(_solve(finite_scores(values)))
    else:
        out = torch.full(real.shape, -1, dtype=torch.int64, device="cpu")
        out[real] = torch.from_numpy(_solve(finite_scores(values[real])))
    # From pinned memory the experts go back while the host goes on.
    return (out.pin_memory() if scores.device.type == "cuda" else out).to(scores.device, non_blocking=True)


@_balanced_assignment.register_fake
def _(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


@cache
def has_numba() -> bool:
    """Whether the compiled form is available."""
    try:
        import numba  # noqa: F401
    except ImportError:  # not installed, or not for this numpy
        return False
    return True


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in machine code, kept on disk where there is a place for it."""
    import numba

    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # nowhere to write
        return numba.njit(function, nogil=True)


def _solve(scores: Tensor, compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = _compiled) -> Whole:
    """Int64[T] for finite scores on the CPU."""
    t, e = scores.shape
    if t == 0 or e == 1:
        return np.zeros(t, dtype=np.int64)
    values = scores.contiguous().to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    whole = np.empty((t, e), dtype=np.int64)
    expert = np.empty(t, dtype=np.int64)
    compiled(_whole_scores)(values, whole, expert, float(2.0 ** score_bits(e)))
    target = np.full(e, t // e, dtype=np.int64)
    price = np.zeros(e, dtype=np.int64)
    # Prices are raised while loads exceed the higher target; the dearest experts then keep it.
    compiled(_raise_prices)(whole, expert, price, -(-t // e), _LOOKS * t)
    target[np.argsort(-price, kind="stable")[: t % e]] += 1
    compiled(_shortest_chains)(whole, expert, price, target)
    return expert


# What follows is compiled, and therefore loops over single numbers. Each also runs, slowly, without being compiled.


def _whole_scores(scores: NDArray[np.floating[Any]], whole: Whole, expert: Whole, scale: float) -> None:
    """Write what each expert loses against a token's best into `whole`, and the best into `expert`."""
    t_all, e_all = scores.shape
    top = np.empty(t_all, dtype=np.float64)
    span = 0.0
    for t in range(t_all):
        high = low = np.float64(scores[t, 0])
        for e in range(1, e_all):
            high, low = max(high, np.float64(scores[t, e])), min(low, np.float64(scores[t, e]))
        top[t] = high / 2
        span = max(span, high / 2 - low / 2)
    for t in range(t_all):
        best = -1
        for e in range(e_all):
            regret = top[t] - np.float64(scores[t, e]) / 2
            whole[t, e] = np.int64(np.rint(-(regret / span) * scale)) if span > 0 else 0
            if best < 0 and whole[t, e] == 0:
                best = e
        expert[t] = best


def _raise_prices(whole: Whole, expert: Whole, price: Whole, most: int, looks: int) -> None:
    """Raise the price of the fullest expert until no more than `most` tokens prefer it; the others go where they like.

    Every token stays at its best expert under the prices (dual ascent; an auction in which whole crowds bid). Ends
    when hardly anything is left to do: no more than a token per expert is in excess, or `looks` were had at tokens.
    """
    t_all, e_all = whole.shape
    load = np.zeros(e_all, dtype=np.int64)
    first = np.full(e_all, -1, dtype=np.int32)  # linked lists: the tokens of each expert
    after = np.full(t_all, -1, dtype=np.int32)
    for t in range(t_all - 1, -1, -1):
        load[expert[t]] += 1
        after[t] = first[expert[t]]
        first[expert[t]] = t
    tokens = np.empty(t_all, dtype=np.int32)
    margin = np.empty(t_all, dtype=np.int64)
    excess = np.sum(np.maximum(load - most, 0))
    while looks > 0 and excess > e_all:
        full = np.argmax(load)
        over = load[full] - most
        was, price[full] = price[full], _FAR  # so that it is nobody's second best: no branch in the loops
        n, t = 0, first[full]
        while t >= 0:
            second = -_FAR
            for e in range(e_all):
                second = max(second, whole[t, e] - price[e])
            tokens[n], margin[n] = t, whole[t, full] - was - second
            n += 1
            t = after[t]
        looks -= n
        order = np.argsort(margin[:n], kind="mergesort")
        first[full] = -1
        for i in range(n - 1, over - 1, -1):
            t = tokens[order[i]]
            after[t] = first[full]
            first[full] = t
        for i in range(over):
            t = tokens[order[i]]
            best, second = -1, -_FAR
            for e in range(e_all):
                value = whole[t, e] - price[e]
                if value > second:
                    best, second = e, value
            after[t] = first[best]
            first[best] = t
            expert[t] = best
            load[best] += 1
            if load[best] <= most:
                excess -= 1
        price[full] = was + margin[order[over - 1]]
        load[full] = most


def _shortest_chains(whole: Whole, expert: Whole, price: Whole, target: Whole) -> None:
    """Successive shortest paths from a start in which every token is at its best expert under the prices.

    As `moekit.functional.balanced_assignment`, but the paths come from Dijkstra's algorithm with potentials.
    """
    t_all, e_all = whole.shape
    floor = t_all // e_all
    nodes = e_all + 1 if t_all % e_all else e_all
    first = np.full(e_all, -1, dtype=np.int32)
    after = np.full(t_all, -1, dtype=np.int32)
    ahead = np.full(t_all, -1, dtype=np.int32)
    surplus = -target
    for t in range(t_all - 1, -1, -1):
        e = expert[t]
        after[t] = first[e]
        if first[e] >= 0:
            ahead[first[e]] = t
        first[e] = t
        surplus[e] += 1
    cost = np.full((nodes, nodes), _FAR, dtype=np.int64)
    potential = np.zeros(nodes, dtype=np.int64)
    potential[:e_all] = -price
    if nodes > e_all:
        potential[e_all] = -_FAR
        for e in range(e_all):
            if target[e] > floor:
                cost[e_all, e] = 0
                potential[e_all] = max(potential[e_all], -price[e])
            else:
                cost[e, e_all] = 0
    excess = np.sum(np.maximum(surplus, 0))
    distance = np.empty(nodes, dtype=np.int64)
    before = np.empty(nodes, dtype=np.int64)
    settled = np.empty(nodes, dtype=np.bool_)
    chain = np.arange(e_all + 1)  # end first; at the start every expert's costs are new
    length = e_all
    while True:
        for i in range(length):
            u = chain[i]
            if u == e_all:
                continue
            for v in range(e_all):
                cost[u, v] = _FAR
            t = first[u]
            while t >= 0:
                here = whole[t, u]
                for v in range(e_all):
                    cost[u, v] = min(cost[u, v], here - whole[t, v])
                t = after[t]
            cost[u, u] = _FAR
        if excess == 0:
            return
        for v in range(nodes):
            distance[v] = -potential[v] if v < e_all and surplus[v] > 0 else _FAR
            before[v] = -1
            settled[v] = False
        for _ in range(nodes):
            u, least = -1, _FAR
            for v in range(nodes):
                if not settled[v] and distance[v] < least:
                    u, least = v, distance[v]
            if u < 0:
                break
            settled[u] = True
            for v in range(nodes):
                if not settled[v] and cost[u, v] < _FAR:
                    through = least + potential[u] + cost[u, v] - potential[v]
                    if through < distance[v]:
                        distance[v], before[v] = through, u
        end, least = -1, _FAR
        for v in range(nodes):
            if distance[v] < _FAR:
                potential[v] += distance[v]
                if v < e_all and surplus[v] < 0 and potential[v] < least:
                    end, least = v, potential[v]
        length, v = 0, end
        while v >= 0:
            chain[length] = v
            length += 1
            v = before[v]
        # As many tokens as are equally good on every step, wanted at the end and too many at the start.
        many = min(surplus[chain[length - 1]], -surplus[end])
        for i in range(1, length):
            u, v = chain[i], chain[i - 1]
            if u == e_all or v == e_all:
                many = 1
                continue
            equal, t = 0, first[u]
            while t >= 0 and equal < many:
                if whole[t, u] - whole[t, v] == cost[u, v]:
                    equal += 1
                t = after[t]
            many = min(many, equal)
        for i in range(1, length):  # the last step first, so that no token moves twice
            u, v = chain[i], chain[i - 1]
            if v == e_all:
                target[u] += 1
                cost[u, e_all], cost[e_all, u] = _FAR, 0
                continue
            if u == e_all:
                target[v] -= 1
                cost[v, e_all], cost[e_all, v] = 0, _FAR
                continue
            left, t = many, first[u]
            while left > 0:
                following = after[t]
                if whole[t, u] - whole[t, v] == cost[u, v]:
                    if ahead[t] >= 0:
                        after[ahead[t]] = following
                    else:
                        first[u] = following
                    if following >= 0:
                        ahead[following] = ahead[t]
                    ahead[t], after[t] = -1, first[v]
                    if first[v] >= 0:
                        ahead[first[v]] = t
                    first[v] = t
                    expert[t] = v
                    left -= 1
                t = following
        surplus[chain[length - 1]] -= many
        surplus[end] += many
        excess -= many
