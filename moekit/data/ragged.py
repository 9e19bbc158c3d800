"""`Ragged`: sentences of different lengths as one flat array, so that numpy can treat a whole batch at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ragged:
    """B sentences; sentence b is ``tokens[starts[b] : starts[b] + lengths[b]]``.

    Attributes:
        tokens: Int64[N], the sentences end to end.
        lengths: Int64[B], summing to N.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """From lists of ids."""
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        lengths = np.fromiter((len(a) for a in arrays), dtype=np.int64, count=len(arrays))
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64), lengths)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Int64[B], where each sentence begins."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def row(self) -> NDArray[np.int64]:
        """Int64[N], the sentence of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def column(self) -> NDArray[np.int64]:
        """Int64[N], the place of each token in its sentence."""
        return np.arange(len(self.tokens)) - np.repeat(self.starts, self.lengths)

    def keep(self, kept: NDArray[np.bool_]) -> Ragged:
        """The same sentences without the tokens where `kept` is False."""
        lengths = np.bincount(self.row[kept], minlength=len(self.lengths)).astype(np.int64)
        return Ragged(self.tokens[kept], lengths)

    def append(self, token: int) -> Ragged:
        """The same sentences, each with one more token at its end."""
        return Ragged(np.insert(self.tokens, np.cumsum(self.lengths), token), self.lengths + 1)

    def prepend(self, token: int) -> Ragged:
        """The same sentences, each with one more token at its beginning."""
        return Ragged(np.insert(self.tokens, self.starts, token), self.lengths + 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if len(self) else [])
