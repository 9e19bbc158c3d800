"""Training steps and evaluation batches, built from a token store.

Both are map-style datasets: item k is a pure function of k (and seed, rank, number of ranks), so any number of
DataLoader workers gives the same sequence and a run can begin at any step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moekit.data.batch import Batch, Sentences
from moekit.data.keyed import fold, key
from moekit.data.plan import Rows, StepPlan, fill
from moekit.data.store import TokenStore
from moekit.data.streams import TaskStreams
from moekit.data.tokenizer import Tokenizer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Rank:
    """Which share of every batch this process takes: rows ``index``, ``index + count``, ..."""

    index: int = 0
    count: int = 1

    @property
    def share(self) -> slice:
        """The rows of a batch that are this rank's."""
        return slice(self.index, None, self.count)


@dataclass(frozen=True)
class Builder:
    """Makes batches: gathers the tokens of rows, which their task collates.

    Attributes:
        store: where the tokens are.
        tokenizer: whose specials are used.
        pad_multiple: padded lengths are rounded up to a multiple of this.
        rank: whose share of the rows to give.
    """

    store: TokenStore
    tokenizer: Tokenizer
    pad_multiple: int = 1
    rank: Rank = Rank()

    def build(self, task: TaskStreams, rows: Rows, direction: str | None = None) -> Batch:
        """The batch of this rank's share of `rows`, padded as wide as all of them need."""
        own = rows[self.rank.share]
        texts = tuple(map(self.store.read, task.starts(own), task.lengths(own)))
        source, target = task.languages(own).copy()
        lengths = tuple(task.lengths(rows))
        return task.task.collate(
            Sentences(texts, lengths, (source, target), own.keys, self.tokenizer, self.pad_multiple, direction)
        )


class TrainingSteps(Dataset[dict[str, Batch]]):
    """Item k is step k: one batch for each task.

    The sentences of a step, over all ranks together, do not depend on how many ranks share them.

    Args:
        tasks: each with its plan, by name.
        builder: of batches.
    """

    def __init__(self, tasks: Mapping[str, tuple[TaskStreams, StepPlan]], builder: Builder) -> None:
        self._tasks, self._builder = dict(tasks), builder

    def __getitem__(self, step: int) -> dict[str, Batch]:
        return {name: self._builder.build(task, plan.rows(step)) for name, (task, plan) in self._tasks.items()}


class EvaluationBatches(Dataset[Batch]):
    """Every sentence once: task by task, direction by direction, short ones first; noise is always the same.

    All ranks have the same number of batches. Only where a direction has fewer sentences than there are ranks do some
    ranks get a batch without rows.

    Args:
        tasks: what to evaluate.
        builder: of batches.
        budget: padded positions of a batch over all ranks.
        seed: of the noise.
    """

    def __init__(self, tasks: list[TaskStreams], builder: Builder, *, budget: int, seed: int = 0) -> None:
        self._builder, ranks = builder, builder.rank.count
        self._batches: list[tuple[TaskStreams, str, Rows]] = []
        for task in tasks:
            for number, sizes in enumerate(task.sizes(builder.pad_multiple)):
                order = np.lexsort((sizes.source,) if sizes.target is None else (sizes.target, sizes.source))
                target = None if sizes.target is None else sizes.target[order]
                cuts = fill(sizes.source[order], target, budget, ranks)
                if len(cuts) > 2 and cuts[-1] - cuts[-2] < ranks:
                    del cuts[-2]
                keys = fold(key(seed, "evaluation", task.name, sizes.name), np.arange(len(order)))
                rows = Rows(np.full(len(order), number), order, keys[order])
                parts = (rows[a:b] for a, b in itertools.pairwise(cuts))
                self._batches.extend((task, sizes.name, part) for part in parts)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        task, name, rows = self._batches[number]
        batch = self._builder.build(task, rows, direction=name)
        batch.index = torch.from_numpy(task.index(rows[self._builder.rank.share]))
        return batch


class StepLoader:
    """Iterates over an epoch of training steps, beginning wherever the trainer stands.

    Not a `DataLoader` itself, because Lightning would give that a distributed sampler, and ranks are already dealt
    with. It has ``state_dict`` so that Lightning knows that it can resume in the middle of an epoch; the state itself
    is the trainer's own count of batches.

    Args:
        steps: what to load.
        steps_per_epoch: length of an epoch.
        first_step: asked at the start of every iteration: the number of batches trained on so far.
        num_workers: processes that build batches ahead; 0 = built when asked for.
        pin_memory: put batches into page-locked memory.
    """

    def __init__(
        self,
        steps: TrainingSteps,
        steps_per_epoch: int,
        first_step: Callable[[], int],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._steps, self._steps_per_epoch, self._first_step = steps, steps_per_epoch, first_step
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        # Lightning counts the batches of the epoch itself, the ones before a resumption included, and stops in time.
        first = self._first_step()
        return _loader(self._steps, range(first, first + len(self)), self._num_workers, self._pin_memory)

    def state_dict(self) -> dict[str, int]:
        """The step that comes next; kept for people who read checkpoints."""
        return {"next_step": self._first_step()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to do: the trainer's own counters say where to begin."""


class EvaluationLoader:
    """Iterates over evaluation batches in order, each built when it is asked for.

    Args:
        batches: what to load.
        pin_memory: put batches into page-locked memory.
    """

    def __init__(self, batches: EvaluationBatches, *, pin_memory: bool = False) -> None:
        self.batches, self._pin_memory = batches, pin_memory

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return _loader(self.batches, range(len(self.batches)), 0, self._pin_memory)


def _loader(dataset: Dataset[_T], order: range, num_workers: int, pin_memory: bool) -> Iterator[_T]:
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=order,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Its own generator: otherwise every epoch would draw from the generator that dropout uses.
            generator=torch.Generator(),
        )
    )
