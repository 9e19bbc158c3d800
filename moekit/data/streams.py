"""`Stream` and `TaskStreams`: which sentences of a store a direction or a language has, and those of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moekit.data.batch import SPECIALS, Batch, Sentences, padded_length
from moekit.data.plan import Rows, Sizes
from moekit.data.store import TokenStore

TooLong = Literal["drop", "truncate"]


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
    """
    lengths = np.stack([store.lengths(section)[:limit] for section in sections])
    longer = np.asarray((lengths > max_length - SPECIALS).any(axis=0))
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
    """A section's sentences end to end, cut into chunks of one length; the last one has what is left.

    Args:
        store: holds the section.
        name: of the stream.
        section: of text.
        languages: ids of source and target language.
        length: tokens of a chunk.
        limit: only the first so many sentences.
    """
    first, last = store.bounds(section, limit)
    starts = np.arange(first, last, length)
    lengths = np.minimum(last - starts, length)
    return Stream(name, np.arange(len(starts)), starts[None], lengths[None], languages)


class TaskStreams:
    """The streams of one task, laid end to end so that a mixed batch is looked up at once.

    Args:
        task: what makes batches of them.
        streams: all of pairs, or all of texts of one language.
    """

    def __init__(self, task: Collator, streams: Sequence[Stream]) -> None:
        self.task, self.streams = task, tuple(streams)
        counts = np.array([len(s) for s in self.streams], dtype=np.int64)
        self._offset = np.cumsum(counts) - counts
        self._lengths = np.concatenate([s.lengths for s in self.streams], axis=1)
        self._index = np.concatenate([s.index for s in self.streams])
        self._starts = np.concatenate([s.starts for s in self.streams], axis=1)
        self._languages = np.array([s.languages for s in self.streams], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        """Sentences (or pairs) of all streams."""
        return len(self._index)

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task.name

    def sizes(self, pad_multiple: int = 1) -> list[Sizes]:
        """What every sentence costs, each side rounded up to `pad_multiple` positions."""
        sizes = []
        for stream in self.streams:
            source, *target = (padded_length(tokens, pad_multiple) for tokens in self.task.sizes(stream.lengths))
            sizes.append(Sizes(stream.name, source, target[0] if target else None))
        return sizes

    def lengths(self, rows: Rows) -> NDArray[np.int64]:
        """Int64[sides, B], tokens of each row, specials not counted."""
        return self._lengths[:, self._offset[rows.stream] + rows.index]

    def starts(self, rows: Rows) -> NDArray[np.int64]:
        """Int64[sides, B], place in the store of the first token of each row."""
        return self._starts[:, self._offset[rows.stream] + rows.index]

    def index(self, rows: Rows) -> NDArray[np.int64]:
        """Int64[B], place of each row's sentence in its section, that is, in what the source gave."""
        return self._index[self._offset[rows.stream] + rows.index]

    def languages(self, rows: Rows) -> NDArray[np.int64]:
        """Int64[2, B], language ids of each row's source and target."""
        return self._languages[rows.stream].T
