"""`Stream` and `TaskStreams`: which sentences of a store a direction or a language has, and those of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.data.batch import SPECIALS, Batch, Sentences, padded_length
from moekit.data.plan import Rows, Sizes
from moekit.data.store import TokenStore
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError

TooLong = Literal["drop", "truncate", "error"]


class Collator(Protocol):
    """What batches ask of a task; `moekit.tasks.Task` answers."""

    @property
    def name(self) -> str:
        """Of the task."""
        ...

    def sizes(self, lengths: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        """Tokens on the sides of a batch, by those of the texts Int64[sides, n]."""
        ...

    def collate(self, rows: Sentences) -> Batch:
        """The batch of some sentences."""
        ...


@dataclass(frozen=True, eq=False)
class Stream:
    """The usable sentences (or pairs) of one direction or language.

    Attributes:
        name: ``"en-de"``, or ``"de"`` for text of one language.
        index: Int64[n], the usable sentences (or chunks), counted within the section.
        starts: Int64[sides, n], place in the store of the first token of each.
        lengths: Int64[sides, n], tokens without specials, after truncation.
        languages: ids of source and target language, the same for text of one language.
        dropped: sentences left out for being too long or empty.
        truncated: sentences that are cut.
    """

    name: str
    index: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    languages: tuple[int, int]
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.index)


def open_stream(
    store: TokenStore,
    name: str,
    sections: Sequence[str],
    languages: tuple[int, int],
    *,
    max_length: int,
    too_long: TooLong = "drop",
    limit: int | None = None,
) -> Stream:
    """Find the usable sentences of one section of `store`, or pairs of two aligned ones.

    Args:
        store: holds the sections.
        name: of the stream.
        sections: one (text) or two (pairs).
        languages: ids of source and target language.
        max_length: most positions of a sentence, its two special tokens included.
        too_long: what happens to longer ones (of a pair: if either side is longer). Empty ones are always dropped.
        limit: only the first so many sentences.

    Raises:
        UserError: one is longer, and `too_long` is "error".
    """
    lengths = np.stack([store.lengths(section)[:limit] for section in sections])
    longer = np.asarray((lengths > max_length - SPECIALS).any(axis=0))
    if too_long == "error" and longer.any():
        first = int(longer.argmax())
        raise UserError(
            f"data.max_length must hold every sentence, as data.too_long is error: got {max_length}, and of the "
            f"{len(longer):,} of {sections[0].rpartition('/')[0] if len(sections) > 1 else sections[0]} "
            f"{int(longer.sum()):,} are longer: the first is number {first + 1:,}, of "
            f"{int(lengths[:, first].max()) + SPECIALS:,} pieces with special tokens, the longest has "
            f"{int(lengths.max()) + SPECIALS:,}. Raise data.max_length, or set data.too_long to drop or truncate."
        )
    usable = np.asarray((lengths > 0).all(axis=0))
    if too_long == "drop":
        usable &= ~longer
    index = np.flatnonzero(usable)
    return Stream(
        name=name,
        index=index,
        starts=np.stack([store.starts(section)[index] for section in sections]),
        lengths=np.minimum(lengths[:, index], max_length - SPECIALS),
        languages=languages,
        dropped=len(usable) - len(index),
        truncated=int(longer[index].sum()),
    )


def open_chunks(
    store: TokenStore, name: str, section: str, languages: tuple[int, int], *, length: int, limit: int | None = None
) -> Stream:
    """A section's sentences end to end, cut into chunks of `length` tokens; the last one has what is left.

    The other arguments are those of `open_stream`.
    """
    first, last = store.bounds(section, limit)
    starts = np.arange(first, last, length)
    lengths = np.minimum(last - starts, length)
    return Stream(name, np.arange(len(starts)), starts[None], lengths[None], languages)


@dataclass(frozen=True)
class Rank:
    """Which share of every batch this process takes: rows ``index``, ``index + count``, ..."""

    index: int = 0
    count: int = 1

    @property
    def share(self) -> slice:
        """The rows of a batch that are this rank's."""
        return slice(self.index, None, self.count)


class TaskStreams:
    """The streams of one task, laid end to end so that the rows of a mixed batch are gathered at once.

    Args:
        task: what makes batches of them.
        streams: all of pairs, or all of texts of one language.
        store: where the tokens are.
        tokenizer: whose specials are used.
        pad_multiple: padded lengths are rounded up to a multiple of this.
        rank: whose share of the rows to give.
    """

    def __init__(
        self,
        task: Collator,
        streams: Sequence[Stream],
        store: TokenStore,
        tokenizer: Tokenizer,
        pad_multiple: int,
        rank: Rank,
    ) -> None:
        self.task, self.streams, self.rank = task, tuple(streams), rank
        self._store, self._tokenizer, self._pad_multiple = store, tokenizer, pad_multiple
        counts = np.array([len(s) for s in self.streams], dtype=np.int64)
        self._offset = np.cumsum(counts) - counts
        self._lengths = np.concatenate([s.lengths for s in self.streams], axis=1)
        self._index = np.concatenate([s.index for s in self.streams])
        self._starts = np.concatenate([s.starts for s in self.streams], axis=1)
        self._languages = np.array([s.languages for s in self.streams], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        """Sentences (or pairs) of all streams."""
        return len(self._index)

    def sizes(self) -> list[Sizes]:
        """What every sentence costs."""
        sizes = []
        for stream in self.streams:
            sides = self.task.sizes(stream.lengths)
            source, *target = (padded_length(tokens, self._pad_multiple) for tokens in sides)
            sizes.append(Sizes(stream.name, source, target[0] if target else None))
        return sizes

    def batch(self, rows: Rows, direction: str | None = None) -> Batch:
        """The batch of this rank's share of `rows`, padded as wide as all of them need.

        Args:
            rows: of all ranks.
            direction: of all rows, in evaluation, where the batch also says which sentences they are.
        """
        places, own = self._offset[rows.stream] + rows.index, rows[self.rank.share]
        here = places[self.rank.share]
        source, target = self._languages[own.stream].T.copy()
        batch = self.task.collate(
            Sentences(
                texts=tuple(map(self._store.read, self._starts[:, here], self._lengths[:, here])),
                lengths=tuple(self._lengths[:, places]),
                languages=(source, target),
                keys=own.keys,
                tokenizer=self._tokenizer,
                pad_multiple=self._pad_multiple,
                direction=direction,
            )
        )
        if direction is not None:
            batch.index = torch.from_numpy(self._index[here])
        return batch
