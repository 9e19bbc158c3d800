"""`Usable`: which sentences of a section are used, in two bits for each, and which one is the k-th of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 20
"""Sentences that are looked at at a time."""
_WORD = 64
_ASKED = 1 << 16


class Usable:
    """Some of the numbers from 0 on.

    Args:
        chosen: Bool arrays that say it of one number after the other; all but the last have `BLOCK` numbers.
    """

    def __init__(self, chosen: Iterable[NDArray[np.bool_]]) -> None:
        bits, counts = [np.zeros((0, _WORD // 8), np.uint8)], [np.zeros(1, np.int64)]
        for block in chosen:
            words = np.pad(block, (0, -len(block) % _WORD)).reshape(-1, _WORD)
            bits.append(np.packbits(words, axis=1))
            counts.append(words.sum(axis=1, dtype=np.int64))
        self._bits = np.concatenate(bits)
        self._before = np.cumsum(np.concatenate(counts))  # chosen ones before each word

    def __len__(self) -> int:
        return int(self._before[-1])

    def at(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Int64[n]: the chosen numbers at places from 0 to their count, not included."""
        found = [self._at(which[first : first + _ASKED]) for first in range(0, len(which), _ASKED)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _at(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        word = np.searchsorted(self._before, which, side="right") - 1
        rest = (which - self._before[word] + 1).astype(np.uint8)
        ranks = np.cumsum(np.unpackbits(self._bits[word], axis=1), axis=1, dtype=np.uint8)
        return word * _WORD + np.argmax(ranks == rest[:, None], axis=1)
