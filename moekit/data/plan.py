"""`StepPlan`: which sentences of which streams make up each training step of a task.

A plan is a pure function of the streams' lengths, the budget and a seed: asked for any step it answers without having
walked there. Steps are grouped into windows of `WINDOW` steps. For each window the mixture says how many sentences
every stream gives, so where a stream stands at the start of any window is a running sum. Each stream walks through
its sentences in one random permutation after the other. Inside a window sentences are sorted by length, cut into as
many batches of equal padded size as there are steps, and the batches shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moekit.data.keyed import Keys, fold, key, permute, uniform
from moekit.data.mixture import TemperatureSchedule, sampling_probabilities
from moekit.errors import UserError

WINDOW = 64  # steps; more = less padding, fewer = a mixture that follows its schedule more closely
_STRIP = 1.2  # sentences whose first sides differ by less than this factor are sorted by the other side
_ORDER, _BATCH, _PHASE, _NOISE = 0, 1, 3, 4
_ROW = 1 << 10  # drawn from the keys that noise is drawn from, by a number that is none of `noising`


class SentenceCosts(Protocol):
    """What the sentences of a stream cost.

    Attributes:
        name: of the stream.
        longest: most padded positions of a sentence, both sides together; 0 of none.
        mean: of these positions.
        two_sided: whether batches have two sides.
    """

    name: str

    @property
    def longest(self) -> int: ...  # noqa: D102
    @property
    def mean(self) -> float: ...  # noqa: D102
    @property
    def two_sided(self) -> bool: ...  # noqa: D102

    def __len__(self) -> int: ...

    def at(self, which: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Padded positions on the two sides of some sentences; None where there is one side."""
        ...


@dataclass(frozen=True, eq=False)
class Sizes:
    """Padded positions that each sentence of a stream takes on its two sides (`target` is None for one-sided tasks)."""

    name: str
    source: NDArray[np.int64]
    target: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def cost(self) -> NDArray[np.int64]:
        """Positions of both sides."""
        return self.source if self.target is None else self.source + self.target

    @property
    def longest(self) -> int:
        """The most positions of a sentence."""
        return int(self.cost.max(initial=0))

    @property
    def mean(self) -> float:
        """Mean of the positions of a sentence."""
        return float(self.cost.mean()) if len(self) else 0.0

    @property
    def two_sided(self) -> bool:
        """Whether there is a target."""
        return self.target is not None

    def at(self, which: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Positions of some sentences."""
        return self.source[which], None if self.target is None else self.target[which]


@dataclass(frozen=True, eq=False)
class Rows:
    """The sentences of one step, over all ranks.

    Attributes:
        stream: Int64[B], index of the stream.
        index: Int64[B], sentence within the stream.
        keys: UInt64[B], a random key of this sentence at this pass over the stream, for noise.
    """

    stream: NDArray[np.int64]
    index: NDArray[np.int64]
    keys: Keys

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, where: Any) -> Rows:
        return Rows(self.stream[where], self.index[where], self.keys[where])


class StepPlan:
    """The sentences of every training step of one task.

    Args:
        name: of the task; tasks with different names draw independently.
        streams: at least one with a sentence.
        budget: padded positions of one step over all ranks, both sides together; steps come within a few percent,
            except where the longest sentences, one a rank, need more.
        temperature: of the mixture over streams.
        shares: probabilities of streams (by name) that do not follow the temperature.
        seed: of all choices.
        least_rows: sentences that every step must have (one per rank).

    Attributes:
        padding: share of a step's positions that hold no token, as measured on the first steps.

    Raises:
        UserError: if there is no sentence, or the longest do not fit the budget.
    """

    def __init__(
        self,
        name: str,
        streams: Sequence[SentenceCosts],
        *,
        budget: int,
        temperature: TemperatureSchedule,
        shares: Mapping[str, float] | None = None,
        seed: int = 0,
        least_rows: int = 1,
    ) -> None:
        self.name = name
        self.streams = tuple(streams)
        self.budget = budget
        self._temperature = temperature
        self._least = least_rows
        self._sizes = np.array([len(s) for s in self.streams], dtype=np.int64)
        if not self._sizes.sum():
            raise UserError(f"The task {name} needs training sentences: none of its streams has any.")
        names = [s.name for s in self.streams]
        for wanted in shares or {}:
            if wanted not in names:
                raise UserError(
                    f"shares of the task {name} must name its streams: got {wanted!r}; they are {', '.join(names)}."
                )
        self._shares = {names.index(wanted): share for wanted, share in (shares or {}).items()}
        longest = max(s.longest for s in self.streams)
        if longest > budget:
            raise UserError(
                f"The token budget of the task {name} must hold its longest sentence: got {budget:,} for sentences of "
                f"up to {longest:,} positions. Raise it (tasks.{name}.tokens; of MultitaskData tokens_per_step, or the "
                "task's share), or lower data.max_length."
            )
        self._two_sided = any(s.two_sided for s in self.streams)
        self._mean = np.array([s.mean for s in self.streams])
        self._key = key(seed, name)
        self._stream_keys = np.concatenate([key(seed, name, s.name) for s in self.streams])
        self._phase = uniform(self._stream_keys, np.zeros(1, dtype=np.int64), _PHASE)
        self._drawn = np.zeros((1, len(self.streams)))  # sentences drawn before each window, fractional
        self._window: tuple[int, list[Rows]] = (-1, [])
        self._overhead = 1.0
        self._overhead, self.padding = self._measured()
        self._drawn = self._drawn[:1]

    def rows(self, step: int) -> Rows:
        """The sentences of `step`, over all ranks."""
        if step < 0:
            raise ValueError(f"step must not be negative: got {step}.")
        window, place = divmod(step, WINDOW)
        if self._window[0] != window:
            self._window = (window, self._batches(window))
        return self._window[1][place]

    @property
    def rows_per_step(self) -> float:
        """Mean number of sentences of a step at the first step's mixture."""
        return float((self._drawn_before(1) - self._drawn_before(0)).sum()) / WINDOW

    def _drawn_before(self, window: int) -> NDArray[np.float64]:
        while len(self._drawn) <= window:
            steps = WINDOW * np.arange(len(self._drawn) - 1, len(self._drawn) + 1023)
            mixture = sampling_probabilities(self._sizes.tolist(), self._temperature.at(steps), self._shares)
            rows = WINDOW * self.budget / (mixture @ self._mean * self._overhead)
            rows = np.maximum(rows, WINDOW * self._least + len(self.streams))
            step = np.concatenate([self._drawn[-1:], mixture * rows[:, None]])
            self._drawn = np.concatenate([self._drawn, np.cumsum(step, axis=0)[1:]])
        return self._drawn[window]

    def _measured(self) -> tuple[float, float]:
        """Measured on the first windows: budget needed per real position, and the padded share of all positions."""
        needed, positions, real = 1.0, 0.0, 0.0
        for window in range(2):
            sizes = [self._positions(rows) for rows in self._batches(window)]
            drawn = self._drawn_before(window + 1) - self._drawn_before(window)
            # Nearly all batches have the same size; a few may be larger because every rank needs a sentence.
            needed = max(needed, float(np.percentile(sizes, 90)) * WINDOW / float(drawn @ self._mean))
            positions += sum(sizes)
            real += float(drawn @ self._mean)
        return needed, max(0.0, 1.0 - real / positions)

    def _positions(self, rows: Rows) -> int:
        source, target = self._sides(rows)
        width = source.max() + (target.max() if self._two_sided else 0)
        return len(rows) * int(width)

    def _sides(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Int64[B] each, positions on both sides; of one side twice where there is no other."""
        source, target = np.empty((2, len(rows)), np.int64)
        for number, here in by_stream(rows.stream):
            one, other = self.streams[number].at(rows.index[here])
            source[here], target[here] = one, one if other is None else other
        return source, target

    def _draws(self, window: int) -> Rows:
        start, stop = (np.floor(self._drawn_before(w) + self._phase).astype(np.int64) for w in (window, window + 1))
        count = np.where(self._sizes > 0, stop - start, 0)
        stream = np.repeat(np.arange(len(self.streams)), count)
        number = np.arange(len(stream)) - np.repeat(np.cumsum(count) - count - start, count)
        size = self._sizes[stream]
        epoch, place = np.divmod(number, size)
        order = fold(fold(self._stream_keys, np.array([_ORDER]))[stream], epoch)
        noise = fold(fold(self._stream_keys, np.array([_NOISE]))[stream], number)
        return Rows(stream, permute(place, size, order), noise)

    def _batches(self, window: int) -> list[Rows]:
        rows = self._draws(window)
        source, target = self._sides(rows)
        strip = (np.log(source) / math.log(_STRIP)).astype(np.int64)
        # Strip by strip from long to short; the other side rises in one strip and falls in the next: it never jumps.
        by_both = (np.where(strip % 2, target, -target), -strip)
        order = np.lexsort(by_both if self._two_sided else (-source,))
        cuts = cut(source[order], target[order] if self._two_sided else None, WINDOW, self._least)
        batch = np.repeat(np.arange(WINDOW), np.diff(cuts))
        own = fold(self._key, np.array([window]))
        shuffled = np.argsort(uniform(own, np.arange(WINDOW), _BATCH), kind="stable")
        within = uniform(rows.keys[order], np.zeros(1, dtype=np.int64), _ROW)
        # Shuffled inside each batch as well: a capacity by position would favour whatever comes first.
        order = order[np.argsort(batch + within, kind="stable")]
        return [rows[order[cuts[b] : cuts[b + 1]]] for b in shuffled]


def by_stream(stream: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The streams of some rows, and the places of the rows of each."""
    order = np.argsort(stream, kind="stable")
    numbers, begins = np.unique(stream[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(order, begins[1:]), strict=True) if len(order) else ()


def cut(
    source: NDArray[np.int64], target: NDArray[np.int64] | None, batches: int, least_rows: int = 1
) -> NDArray[np.int64]:
    """Cut sorted sentences into `batches` runs whose largest padded size is as small as it can be (within 1/2 %).

    Returns:
        Int64[batches + 1], where runs begin; the last entry is the number of sentences.
    """
    count = len(source)
    assert count >= batches * least_rows
    real = int(source.sum() + (0 if target is None else target.sum()))
    low = high = max(1, -(-real // batches))
    while len(runs := fill(source, target, high, least_rows, batches)) > batches + 1:
        low, high = high, high + max(1, high // 8)
    best = runs
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        runs = fill(source, target, middle, least_rows, batches)
        if len(runs) > batches + 1:
            low = middle
        else:
            high, best = middle, runs
    return _exactly(best, batches, least_rows)


def fill(
    source: NDArray[np.int64],
    target: NDArray[np.int64] | None,
    size: int,
    least_rows: int = 1,
    most_batches: int | None = None,
) -> list[int]:
    """Cut sorted sentences into runs, each filled up to the padded `size` before the next begins.

    Returns:
        Where runs begin, and the number of sentences. Gives up, one run over, when there are more than `most_batches`.
    """
    count, at, begins = len(source), 0, [0]
    ahead = 2 * count // (most_batches or count or 1) + least_rows + 1
    while at < count and (most_batches is None or len(begins) <= most_batches + 1):
        fits = 0
        while True:  # a run longer than expected: look twice as far
            width = np.maximum.accumulate(source[at : at + ahead])
            if target is not None:
                width = width + np.maximum.accumulate(target[at : at + ahead])
            fits = int(np.searchsorted(width * np.arange(1, len(width) + 1), size, side="right"))
            if fits < len(width) or at + ahead >= count:
                break
            ahead *= 2
        at = min(count, at + max(fits, least_rows))
        begins.append(at)
    return begins


def _exactly(begins: list[int], batches: int, least_rows: int) -> NDArray[np.int64]:
    sizes = np.diff(begins).tolist()
    while len(sizes) < batches:
        largest = int(np.argmax(sizes))
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [sizes[largest] - half, half]
    # A run that is too short (the last, which got what was left, or half of a small one) takes from the run before it;
    # where that leaves too few at the head, runs take from the one behind.
    for order, giver in ((range(batches - 1, 0, -1), -1), (range(batches - 1), 1)):
        for i in order:
            lack = max(0, least_rows - sizes[i])
            sizes[i] += lack
            sizes[i + giver] -= lack
    return np.concatenate([[0], np.cumsum(sizes)])
