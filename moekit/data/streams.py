"""`Stream` and `TaskStreams`: which sentences of a store a direction or a language has, and those of a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.data.batch import SPECIALS, Batch, Sentences, padded_length
from moekit.data.plan import Rows, by_stream
from moekit.data.ragged import Ragged
from moekit.data.store import TokenStore
from moekit.data.tokenizer import Tokenizer
from moekit.data.usable import BLOCK, Usable
from moekit.errors import UserError

TooLong = Literal["drop", "truncate", "error"]
_SAMPLE = 2048  # texts


class Collator(Protocol):
    """What batches ask of a task; `moekit.tasks.Task` answers."""

    @property
    def name(self) -> str:
        """Of the task."""
        ...

    @property
    def pairs(self) -> bool:
        """Whether it needs pairs of texts."""
        ...

    @property
    def seeks_words(self) -> bool:
        """Whether sizes depend on what texts say."""
        ...

    def sizes(self, lengths: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        """Tokens on the sides of a batch, by those of the texts Int64[sides, n]; where it seeks words, at most."""
        ...

    def text_sizes(self, text: Ragged, languages: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        """The same by the texts themselves and the ids of their languages, where it seeks words."""
        ...

    def collate(self, rows: Sentences) -> Batch:
        """The batch of some sentences."""
        ...


class Stream(Protocol):
    """The usable sentences (or pairs, or chunks) of one direction or language.

    What it says of them it looks up in the store, so that in memory is next to nothing of a long text.

    Attributes:
        name: ``"en-de"``, or ``"de"`` for text of one language.
        languages: ids of source and target language, the same for text of one language.
        dropped: sentences left out for being too long or empty.
        truncated: sentences that are cut.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def languages(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def dropped(self) -> int: ...  # noqa: D102
    @property
    def truncated(self) -> int: ...  # noqa: D102

    def __len__(self) -> int: ...

    def at(self, which: NDArray[np.int64]) -> Found:
        """Some of them, by their numbers among the usable ones."""
        ...

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        """Int64[sides, n], tokens without specials of one after the other, some at a time."""
        ...


@dataclass(frozen=True, eq=False)
class Found:
    """Where some texts of a stream are.

    Attributes:
        index: Int64[n], their numbers within the section.
        starts: Int64[sides, n], place in the store of the first token of each.
        lengths: Int64[sides, n], tokens without specials, after truncation.
        cut: Bool[sides, n], whether the text goes on behind them.
    """

    index: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    cut: NDArray[np.bool_]


class _Texts:
    """Sentences of a section, or pairs of two aligned ones; see `open_stream`."""

    def __init__(
        self,
        store: TokenStore,
        name: str,
        sections: Sequence[str],
        languages: tuple[int, int],
        count: int,
        most: int,
        drop: bool,
    ) -> None:
        self.name, self.languages = name, languages
        self._store, self._count, self._most = store, count, most
        self._firsts = np.array([store.section(section).first for section in sections])
        self._drop, self.truncated, used = drop, 0, 0
        for lengths in self._blocks():
            usable = self._usable(lengths)
            used += int(usable.sum())
            self.truncated += int(((lengths > most).any(axis=0) & usable).sum())
        self.dropped = count - used
        self._chosen = Usable(map(self._usable, self._blocks())) if self.dropped else None

    def __len__(self) -> int:
        return self._count - self.dropped

    def _blocks(self) -> Iterator[NDArray[np.int64]]:
        """Int64[sides, n], tokens of all sentences, before truncation."""
        for begin in range(0, self._count, BLOCK):
            end = min(begin + BLOCK, self._count)
            yield np.stack([np.diff(self._store.offsets[first + begin : first + end + 1]) for first in self._firsts])

    def _usable(self, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        usable = np.asarray((lengths > 0).all(axis=0))
        return usable & (lengths <= self._most).all(axis=0) if self._drop else usable

    def at(self, which: NDArray[np.int64]) -> Found:
        index = which if self._chosen is None else self._chosen.at(which)
        places = self._firsts[:, None] + index
        starts = np.asarray(self._store.offsets[places])
        whole = self._store.offsets[places + 1] - starts
        return Found(index, starts, np.minimum(whole, self._most), np.asarray(whole > self._most))

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        for lengths in self._blocks():
            yield np.minimum(lengths[:, self._usable(lengths)], self._most)


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
    count = store.section(sections[0]).count
    count = count if limit is None else min(count, limit)
    most = max_length - SPECIALS
    found = _Texts(store, name, sections, languages, count, most, too_long == "drop")
    if too_long == "error":
        _require_short(found._blocks(), sections, count, most)
    return found


def _require_short(blocks: Iterable[NDArray[np.int64]], sections: Sequence[str], count: int, most: int) -> None:
    first, of_first, longest, number = -1, 0, 0, 0
    for place, lengths in enumerate(blocks):
        longer = (lengths > most).any(axis=0)
        if first < 0 and longer.any():
            first = place * BLOCK + int(longer.argmax())
            of_first = int(lengths[:, longer.argmax()].max())
        number, longest = number + int(longer.sum()), max(longest, int(lengths.max()))
    if number:
        raise UserError(
            f"data.max_length must hold every sentence, as data.too_long is error: got {most + SPECIALS}, and of the "
            f"{count:,} of {sections[0].rpartition('/')[0] if len(sections) > 1 else sections[0]} "
            f"{number:,} are longer: the first is number {first + 1:,}, of "
            f"{of_first + SPECIALS:,} pieces with special tokens, the longest has "
            f"{longest + SPECIALS:,}. Raise data.max_length, or set data.too_long to drop or truncate."
        )


@dataclass(frozen=True, eq=False)
class _Chunks:
    """Pieces of a section between two places of the store, each of `length` tokens but the last; see `open_chunks`."""

    name: str
    languages: tuple[int, int]
    first: int
    last: int
    length: int
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.length)

    def at(self, which: NDArray[np.int64]) -> Found:
        starts = self.first + which * self.length
        rest = self.last - starts
        return Found(which, starts[None], np.minimum(rest, self.length)[None], (rest > self.length)[None])

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        for begin in range(0, len(self), BLOCK):
            yield self.at(np.arange(begin, min(begin + BLOCK, len(self)))).lengths


def open_chunks(
    store: TokenStore, name: str, section: str, languages: tuple[int, int], *, length: int, limit: int | None = None
) -> Stream:
    """A section's sentences end to end, cut into chunks of `length` tokens; the last one has what is left.

    The other arguments are those of `open_stream`.
    """
    first, last = store.bounds(section, limit)
    return _Chunks(name, languages, first, last, length)


class StreamSizes:
    """What the texts of a stream cost in the batches of a task; see `moekit.data.plan.SentenceCosts`.

    Of a task that seeks words the cost of a text is known when it is read: the longest is then the most that one of its
    length can cost, and the mean that of a sample.

    Args:
        stream: the texts.
        task: whose batches.
        pad_multiple: padded lengths are rounded up to a multiple of this.
        store: where the texts are.
    """

    def __init__(self, stream: Stream, task: Collator, pad_multiple: int, store: TokenStore) -> None:
        self.name, self._stream, self._task, self._pad_multiple = stream.name, stream, task, pad_multiple
        self._store = store
        self.longest, total = 0, 0
        for lengths in stream.lengths():
            if lengths.shape[1]:
                source, target = self._sides(task.sizes(lengths))
                cost = source if target is None else source + target
                self.longest, total = max(self.longest, int(cost.max())), total + int(cost.sum())
        self.mean = total / max(len(stream), 1)
        self.two_sided = self._sides(task.sizes(np.ones((2, 1), np.int64)))[1] is not None
        if task.seeks_words and len(stream):
            self.mean = float(np.mean(np.sum([side for side in self.at(sampled(stream)) if side is not None], axis=0)))

    def __len__(self) -> int:
        return len(self._stream)

    def at(self, which: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Padded positions of the two sides of some texts; None where there is one side."""
        if self._task.seeks_words:
            return self._sides(self._task.text_sizes(*read(self._store, self._stream, which)))
        return self._sides(self._task.sizes(self._stream.at(which).lengths))

    def _sides(self, sizes: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        source, *target = (padded_length(tokens, self._pad_multiple) for tokens in sizes)
        return source, target[0] if target else None


def sampled(stream: Stream) -> NDArray[np.int64]:
    """Int64, at most so many numbers of texts as tell the mean of a stream within a percent or so, evenly spread."""
    return np.linspace(0, len(stream) - 1, min(len(stream), _SAMPLE)).astype(np.int64)


def read(store: TokenStore, stream: Stream, which: NDArray[np.int64]) -> tuple[Ragged, NDArray[np.int64]]:
    """Some texts of a stream of one language, and the ids of their languages, Int64[n]."""
    found = stream.at(which)
    return store.read(found.starts[0], found.lengths[0]), np.full(len(which), stream.languages[0], np.int64)


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
    """The streams of one task, of whose texts it makes batches.

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
        self._languages = np.array([s.languages for s in self.streams], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        """Sentences (or pairs) of all streams."""
        return sum(map(len, self.streams))

    def sizes(self) -> list[StreamSizes]:
        """What the sentences of each stream cost."""
        return [StreamSizes(stream, self.task, self._pad_multiple, self._store) for stream in self.streams]

    def sample(self) -> Iterator[tuple[Ragged, NDArray[np.int64]]]:
        """Some texts of each stream of one language, and the ids of their languages."""
        return (read(self._store, stream, sampled(stream)) for stream in self.streams if len(stream))

    def batch(self, rows: Rows, direction: str | None = None) -> Batch:
        """The batch of this rank's share of `rows`, padded as wide as all of them need.

        Args:
            rows: of all ranks.
            direction: of all rows, in evaluation, where the batch also says which sentences they are.
        """
        found, share = self._found(rows), self.rank.share
        own = rows[share]
        source, target = self._languages[own.stream].T.copy()
        batch = self.task.collate(
            Sentences(
                texts=tuple(map(self._store.read, found.starts[:, share], found.lengths[:, share])),
                lengths=tuple(found.lengths),
                cut=tuple(found.cut[:, share]),
                languages=(source, target),
                keys=own.keys,
                tokenizer=self._tokenizer,
                pad_multiple=self._pad_multiple,
                direction=direction,
            )
        )
        if direction is not None:
            batch.index = torch.from_numpy(found.index[share].copy())
        return batch

    def _found(self, rows: Rows) -> Found:
        """Where the texts of `rows` are, whichever streams they are of."""
        parts = [(here, self.streams[number].at(rows.index[here])) for number, here in by_stream(rows.stream)]
        sides = 2 if self.task.pairs else 1
        index = np.empty(len(rows), np.int64)
        starts, lengths = np.empty((2, sides, len(rows)), np.int64)
        cut = np.empty((sides, len(rows)), np.bool_)
        for here, part in parts:
            index[here], starts[:, here], lengths[:, here] = part.index, part.starts, part.lengths
            cut[:, here] = part.cut
        return Found(index, starts, lengths, cut)
