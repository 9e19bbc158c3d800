"""Training steps and evaluation batches, built from a token store.

Both are map-style datasets: item k is a pure function of k (and seed, rank, number of ranks), so any number of
DataLoader workers gives the same sequence and a run can begin at any step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moekit.data.batch import Batch
from moekit.data.keyed import fold, key
from moekit.data.plan import Rows, StepPlan, fill
from moekit.data.streams import TaskStreams
from moekit.performance import keep_memory_in_worker, keeps_memory

_T = TypeVar("_T")


class TrainingSteps(Dataset[dict[str, Batch]]):
    """Item k is step k: one batch for each task.

    The sentences of a step, over all ranks together, do not depend on how many ranks share them.

    Args:
        tasks: each with its plan, by name.
    """

    def __init__(self, tasks: Mapping[str, tuple[TaskStreams, StepPlan]]) -> None:
        self._tasks = dict(tasks)

    def __getitem__(self, step: int) -> dict[str, Batch]:
        return {name: task.batch(plan.rows(step)) for name, (task, plan) in self._tasks.items()}


class EvaluationBatches(Dataset[Batch]):
    """Every sentence once: task by task, direction by direction, short ones first; noise is always the same.

    All ranks have the same number of batches. Only where a direction has fewer sentences than there are ranks do some
    ranks get a batch without rows.

    Args:
        tasks: what to evaluate.
        budget: padded positions of a batch over all ranks.
        seed: of the noise.
    """

    def __init__(self, tasks: Iterable[TaskStreams], *, budget: int, seed: int = 0) -> None:
        self._batches: list[tuple[TaskStreams, str, Rows]] = []
        for task in tasks:
            ranks = task.rank.count
            for number, sizes in enumerate(task.sizes()):
                source, target = sizes.at(np.arange(len(sizes)))
                order = np.lexsort((source,) if target is None else (target, source))
                cuts = fill(source[order], None if target is None else target[order], budget, ranks)
                if len(cuts) > 2 and cuts[-1] - cuts[-2] < ranks:
                    del cuts[-2]
                keys = fold(key(seed, "evaluation", task.task.name, sizes.name), np.arange(len(order)))
                rows = Rows(np.full(len(order), number), order, keys[order])
                parts = (rows[a:b] for a, b in itertools.pairwise(cuts))
                self._batches.extend((task, sizes.name, part) for part in parts)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        task, name, rows = self._batches[number]
        return task.batch(rows, direction=name)


class Loader(Generic[_T]):
    """Iterates over items in order, beginning wherever the trainer stands.

    Not a `DataLoader` itself, because Lightning would give that a distributed sampler, and ranks are already dealt
    with. It has ``state_dict`` so that Lightning knows that it can resume in the middle of an epoch; the state itself
    is the trainer's own count of batches.

    Args:
        items: what to load.
        length: of an epoch, in items.
        first_step: asked at the start of every iteration: the number of batches trained on so far; None = from the
            first item on, as in evaluation.
        num_workers: processes that build batches ahead; 0 = built when asked for.
        pin_memory: put batches into page-locked memory.
    """

    def __init__(
        self,
        items: Dataset[_T],
        length: int,
        first_step: Callable[[], int] | None = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._items, self._length, self._first_step = items, length, first_step
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_T]:
        # Lightning counts the batches of the epoch itself, the ones before a resumption included, and stops in time.
        first = self.state_dict()["next_step"]
        loader = DataLoader(
            self._items,
            batch_size=None,
            sampler=range(first, first + len(self)),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # Its own generator: otherwise every epoch would draw from the generator that dropout uses.
            generator=torch.Generator(),
            worker_init_fn=keep_memory_in_worker if keeps_memory() else None,
        )
        return iter(loader)

    def state_dict(self) -> dict[str, int]:
        """The step that comes next; kept for people who read checkpoints."""
        return {"next_step": self._first_step() if self._first_step else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to do: the trainer's own counters say where to begin."""
