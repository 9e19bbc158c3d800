"""Random numbers that are a function of a key: the same whoever asks, in whatever order, in whatever process.

A stateful generator would tie the noise of a sentence to what was drawn before it, and so to the rank, the worker and
the neighbours in its batch. Here every sentence carries its own 64-bit key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6


def mix(x: Keys) -> Keys:
    """A bijection of 64-bit words that looks random: the output function of SplitMix64.

    Source: Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators, figure 17 (variant 13 constants).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | str) -> Keys:
    """One key, UInt64[1], from integers and names."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        words = [part] if isinstance(part, int) else [len(part), *part.encode()]
        for word in words:
            state = mix((state ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF)) + _GOLDEN)
    return state


def fold(keys: Keys, values: NDArray[np.int64]) -> Keys:
    """New keys from `keys` and integers, elementwise (they broadcast)."""
    return mix((keys ^ mix(values.astype(np.uint64) * _GOLDEN + _GOLDEN)) + _GOLDEN)


def uniform(keys: Keys, counter: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    """Float64 in [0, 1): draw number `counter` of each key; different `stream` numbers are independent."""
    offset = np.array([(stream << 40) + 1], dtype=np.uint64)
    word = mix(mix(keys) + (counter.astype(np.uint64) + offset) * _GOLDEN)
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: NDArray[np.int64], size: NDArray[np.int64] | int, keys: Keys) -> NDArray[np.int64]:
    """Where a random permutation of ``0 .. size - 1`` sends each `index`; no table of that size is ever made.

    A Feistel network on the next power of four, walked until it falls inside. `size` and `keys` may differ by
    element, so that one call serves many permutations.
    """
    x = index.astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), x.shape)
    keys = np.broadcast_to(keys, x.shape)
    bits = np.frexp(np.maximum(sizes, 2) - np.uint64(1))[1].astype(np.uint64)  # bit length of size - 1
    half = (bits + np.uint64(1)) >> np.uint64(1)
    todo = np.arange(len(x))
    while len(todo):
        shift, own = half[todo], keys[todo]
        low = (np.uint64(1) << shift) - np.uint64(1)
        left, right = x[todo] >> shift, x[todo] & low
        for turn in range(_ROUNDS):
            word = np.array([(turn + 1) << 32], dtype=np.uint64)
            left, right = right, left ^ (mix((right ^ word) * _GOLDEN ^ own) & low)
        x[todo] = (left << shift) | right
        todo = todo[x[todo] >= sizes[todo]]
    return x.astype(np.int64)
