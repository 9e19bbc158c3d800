"""Tables from a key (a token, a position, a bucket of bigrams) to an expert, for routers that hash.

A table is Int64[num_keys] on the CPU and a function of its arguments alone: the same on every machine, in every process
and for every version of Python, because the draws come from the integer hash below and not from a generator. Tables
made of embeddings are so as far as float64 sums are: two machines may round a tie between clusters apart.
"""

from __future__ import annotations

import heapq
from typing import Literal, TypeVar

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_Word = TypeVar("_Word", int, Tensor)


def _mix(x: _Word) -> _Word:
    """A bijection of 32-bit words that looks random.

    Multiply-xorshift with two odd constants below 2**31, so that no product leaves the 63 bits of an Int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def hash_ids(*ids: Tensor, seed: int = 0) -> Tensor:
    """Int64 in 0..2**32-1: a hash of the ids at each place, in this order.

    Args:
        *ids: Int of one shape, not negative, below 2**32.
        seed: different seeds give independent hashes.

    Returns:
        Int64 of that shape, on the device of the ids.

    Source: ours; the mixing function is of the family described in Steele, Lea, Flood 2014.
    """
    state = _mix(_mix((seed + _GOLDEN) & _LOW) ^ ((seed >> 32) & _LOW))
    words = torch.full_like(ids[0], state, dtype=torch.int64)
    for one in ids:
        words = _mix(((words + _GOLDEN) & _LOW) ^ one.to(torch.int64))
    return words


def random_table(num_keys: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Int64[num_keys]: every key to an expert drawn uniformly.

    Source: arXiv:2106.04426 (random hash).
    """
    _check(num_keys, num_experts)
    return hash_ids(_keys(num_keys), seed=seed) % num_experts


def dealt_table(num_keys: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Int64[num_keys]: keys in a random order dealt to the experts, so that each has equally many, up to one.

    Source: ours; balances keys that are equally frequent, as positions are.
    """
    _check(num_keys, num_experts)
    table = torch.empty(num_keys, dtype=torch.int64, device="cpu")
    table[hash_ids(_keys(num_keys), seed=seed).argsort(stable=True)] = _keys(num_keys) % num_experts
    return table


def balanced_table(
    counts: Tensor, num_experts: int, *, seed: int = 0, shuffled: Literal["equal", "octave"] = "equal"
) -> Tensor:
    """Keys by falling frequency, each to the expert that has the least so far: equal load where frequencies allow it.

    No table balances a key that is more frequent than an even share. Keys that never occurred are dealt so that experts
    have equally many keys.

    Args:
        counts: Int[V], how often each key occurs; `moekit.data.counts` counts a corpus.
        num_experts: E.
        seed: seed of the order among keys that are taken as equally frequent.
        shuffled: which keys those are: "equal" = of equal count (the paper's order is by count alone), "octave" = with
            counts between the same powers of two. Under "equal" tables of different seeds differ among rare keys only;
            "octave" also mixes the frequent ones, as the several tables of MultiHash need, at the same balance where
            rare keys are many.

    Returns:
        Int64[V].

    Raises:
        ValueError: if `counts` is not a list of whole numbers, or one is negative.

    Source: arXiv:2106.04426 (balanced assignment).
    """
    if counts.is_meta or counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(
            f"balanced_table needs counts Int[V]: got {counts.dtype} of shape {tuple(counts.shape)} on "
            f"{counts.device}. Give the number of occurrences of each key."
        )
    _check(counts.numel(), num_experts)
    if shuffled not in ("equal", "octave"):
        raise ValueError(f'balanced_table shuffled must be "equal" or "octave": got {shuffled!r}.')
    mass = [int(n) for n in counts.tolist()]
    if min(mass) < 0:
        raise ValueError(f"balanced_table needs counts of at least 0: got {min(mass)}.")
    draw = hash_ids(_keys(len(mass)), seed=seed).tolist()
    rank = mass if shuffled == "equal" else [n.bit_length() for n in mass]
    table = [0] * len(mass)
    least = [(0, e) for e in range(num_experts)]  # a heap
    held = [0] * num_experts
    never = []
    for key in sorted(range(len(mass)), key=lambda key: (-rank[key], draw[key], key)):
        if mass[key] == 0:
            never.append(key)
            continue
        load, expert = least[0]
        heapq.heapreplace(least, (load + mass[key], expert))
        table[key] = expert
        held[expert] += 1
    fewest = [(number, e) for e, number in enumerate(held)]
    heapq.heapify(fewest)
    for key in never:
        number, expert = fewest[0]
        heapq.heapreplace(fewest, (number + 1, expert))
        table[key] = expert
    return torch.tensor(table, dtype=torch.int64, device="cpu")


def clustered_table(embeddings: Tensor, num_experts: int, *, seed: int = 0) -> Tensor:
    """Similar keys to the same expert: k-means of their embeddings with one cluster per expert.

    Args:
        embeddings: Float[V, D], for example of a dense model trained before.
        num_experts: E, at most V.
        seed: seed of the first centres (k-means++).

    Returns:
        Int64[V].

    Raises:
        ValueError: if the embeddings are no finite matrix of at least E rows.

    Source: arXiv:2106.04426 (token clusters). Differs: the paper does not say how k-means begins.
    """
    if embeddings.is_meta or embeddings.ndim != 2 or not bool(embeddings.isfinite().all()):
        raise ValueError(
            f"k-means needs finite embeddings Float[V, D]: got {embeddings.dtype} of shape {tuple(embeddings.shape)} "
            f"on {embeddings.device}."
        )
    _check(embeddings.shape[0], num_experts)
    if embeddings.shape[0] < num_experts:
        raise ValueError(
            f"k-means needs at least as many keys as experts: got {embeddings.shape[0]} embeddings for {num_experts} "
            "experts."
        )
    return _k_means(embeddings.detach().to("cpu", torch.float64), num_experts, seed)


def dispersed_table(embeddings: Tensor, num_experts: int, *, seed: int = 0) -> Tensor:
    """Similar keys to different experts: the members of every k-means cluster are dealt to all experts in turn.

    Arguments and errors are those of `clustered_table`; the order in which members are dealt is drawn from `seed` too.

    Returns:
        Int64[V]; experts have equally many keys, up to one, and so it is within each cluster.

    Source: arXiv:2106.04426 (dispersed hash).
    """
    cluster = clustered_table(embeddings, num_experts, seed=seed)
    keys = _keys(cluster.numel())
    order = hash_ids(keys, seed=seed).argsort(stable=True)
    order = order[cluster[order].argsort(stable=True)]
    table = torch.empty_like(cluster)
    table[order] = keys % num_experts
    return table


def _keys(number: int) -> Tensor:
    # Said to be on the CPU: under torch.device("meta") a table is still made.
    return torch.arange(number, device="cpu")


def _check(num_keys: int, num_experts: int) -> None:
    if num_keys < 1 or num_experts < 1:
        raise ValueError(f"a hash table needs at least one key and one expert: got {num_keys} and {num_experts}.")


def _k_means(x: Tensor, k: int, seed: int, sweeps: int = 100) -> Tensor:
    """Int64[V]: the cluster of each row of Float64[V, D] after Lloyd's algorithm from a k-means++ start."""
    centres = x[_first_centres(x, k, seed)]
    cluster = torch.full((x.shape[0],), -1, dtype=torch.int64, device="cpu")
    for _ in range(sweeps):
        distance = _distances(x, centres)
        nearest = distance.argmin(1)
        sizes = torch.bincount(nearest, minlength=k)
        away = distance.gather(1, nearest[:, None]).squeeze(1)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            # A cluster without members takes the row that is farthest from its centre, if that is not alone there.
            far = int(torch.where(sizes[nearest] > 1, away, -1.0).argmax())
            sizes[nearest[far]] -= 1
            nearest[far], away[far] = empty, 0.0
            sizes[empty] = 1
        if torch.equal(nearest, cluster):
            break
        cluster = nearest
        sums = torch.zeros_like(centres).index_add_(0, cluster, x)
        centres = sums / sizes[:, None]
    return cluster


def _first_centres(x: Tensor, k: int, seed: int) -> list[int]:
    """Numbers of k rows, each drawn with probability proportional to its squared distance from those before."""
    draws = (hash_ids(_keys(k), seed=seed).double() / 2.0**32).tolist()
    chosen = [int(draws[0] * x.shape[0])]
    distance = _distances(x, x[chosen])[:, 0]
    for draw in draws[1:]:
        total = distance.cumsum(0)
        if float(total[-1]) == 0.0:  # all rows are chosen ones already
            chosen.append(int(draw * x.shape[0]))
            continue
        chosen.append(min(int(torch.searchsorted(total, draw * total[-1], right=True)), x.shape[0] - 1))
        distance = torch.minimum(distance, _distances(x, x[chosen[-1:]])[:, 0])
    return chosen


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    """Float64[V, K], squared and not negative."""
    product = x @ centres.t()
    return (x.square().sum(1, keepdim=True) - 2 * product + centres.square().sum(1)).clamp_min(0.0)
