"""Rows of examples as batches, and their order: a function of seed and step, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moekit.data.keyed import key, permute
from moekit.folder_text.encoding import IGNORED, Encoded

Row = Sequence[Encoded]
"""The examples that share a row."""


@dataclass(frozen=True)
class FolderBatch:
    """Rows as a model reads them, padded on the right.

    Attributes:
        ids: Int64[B, S].
        labels: Int64[B, S], the token itself where it is to be predicted, else -100.
        real: Bool[B, S], False = padding.
        sequence: Int64[B, S], which example a token belongs to, from 0.
        positions: Int64[B, S], the place of a token in its example; padding begins anew.
        packed: whether some row holds several examples.
        predictions: Float32[], the tokens to be predicted, for one such batch on average over the optimizer step.
    """

    ids: Tensor
    labels: Tensor
    real: Tensor
    sequence: Tensor
    positions: Tensor
    packed: bool
    predictions: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> FolderBatch:
        """The batch on another device."""
        moved = {name: v.to(device, non_blocking=non_blocking) for name, v in vars(self).items() if name != "packed"}
        return FolderBatch(**moved, packed=self.packed)

    def pin_memory(self) -> FolderBatch:
        """The batch in page-locked memory."""
        return FolderBatch(
            **{name: v.pin_memory() for name, v in vars(self).items() if name != "packed"}, packed=self.packed
        )

    def num_tokens(self) -> Tensor:
        """How many tokens are real."""
        return self.real.sum()


def collate(rows: Sequence[Row], *, pad: int, predictions: float, counted: Sequence[bool] | None = None) -> FolderBatch:
    """A batch of rows.

    Args:
        rows: at least one.
        pad: the id of padding.
        predictions: the number of `FolderBatch`.
        counted: which rows have labels; None = all.
    """
    length = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), length)
    ids, labels = np.full(shape, pad, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    real, sequence, positions = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64), np.zeros_like(ids)
    number = 0
    for place, row in enumerate(rows):
        start = 0
        for example in row:
            here = slice(start, start + len(example))
            ids[place, here], real[place, here], sequence[place, here] = example.ids, True, number
            if counted is None or counted[place]:
                labels[place, here] = example.labels
            positions[place, here] = np.arange(len(example))
            start, number = here.stop, number + 1
        sequence[place, start:] = max(number - 1, 0)
        positions[place, start:] = np.arange(length - start)
    return FolderBatch(
        ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        real=torch.from_numpy(real),
        sequence=torch.from_numpy(sequence),
        positions=torch.from_numpy(positions),
        packed=any(len(row) > 1 for row in rows),
        predictions=torch.tensor(predictions, dtype=torch.float32),
    )


@dataclass(frozen=True)
class Dealing:
    """Who reads what of a step.

    Attributes:
        rows: rows of a batch.
        rank: the number of this process among those that read different rows.
        ranks: how many those are.
        accumulate: batches of a step, for each.
    """

    rows: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    @property
    def step(self) -> int:
        """Rows of an optimizer step, all ranks together."""
        return self.rows * self.ranks * self.accumulate


class TrainingBatches(Dataset[FolderBatch]):
    """Batch `n` of a rank, for any n: rows without end, every pass over them in an order of its own.

    Which rows a step has depends on the seed and the step, and on nothing else: not on the number of ranks, and not on
    how many batches are accumulated.

    Args:
        rows: at least one.
        dealing: who reads what.
        pad: the id of padding.
        seed: random seed of the order.
    """

    def __init__(self, rows: Sequence[Row], dealing: Dealing, *, pad: int, seed: int) -> None:
        self.rows, self.dealing, self.pad, self.seed = rows, dealing, pad, seed
        self._predicted = np.array([sum(example.predicted for example in row) for row in rows])

    @property
    def steps_per_pass(self) -> int:
        """Optimizer steps in which about all rows are read once."""
        return max(1, len(self.rows) // self.dealing.step)

    def order(self, step: int) -> list[int]:
        """The rows of an optimizer step, of all ranks."""
        places = np.arange(step * self.dealing.step, (step + 1) * self.dealing.step)
        passes, inside = places // len(self.rows), places % len(self.rows)
        keys = np.concatenate([key(self.seed, "rows", int(number)) for number in passes])
        return [int(row) for row in permute(inside, len(self.rows), keys)]

    def __getitem__(self, batch: int) -> FolderBatch:
        step, micro = divmod(batch, self.dealing.accumulate)
        order = self.order(step)
        first = (micro * self.dealing.ranks + self.dealing.rank) * self.dealing.rows
        mine = [self.rows[row] for row in order[first : first + self.dealing.rows]]
        share = float(self._predicted[order].sum()) / (self.dealing.ranks * self.dealing.accumulate)
        return collate(mine, pad=self.pad, predictions=share)


class HeldOutBatches(Dataset[FolderBatch]):
    """All held-out rows once, dealt to the ranks, each of which gets as many batches.

    Rows that fill up the last batches have no labels.

    Args:
        rows: at least one.
        dealing: who reads what.
        pad: the id of padding.
    """

    def __init__(self, rows: Sequence[Row], dealing: Dealing, *, pad: int) -> None:
        self.rows, self.dealing, self.pad = rows, dealing, pad

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.dealing.rows * self.dealing.ranks))

    def __getitem__(self, batch: int) -> FolderBatch:
        first = (batch * self.dealing.ranks + self.dealing.rank) * self.dealing.rows
        numbers = range(first, first + self.dealing.rows)
        rows = [self.rows[number] if number < len(self.rows) else self.rows[0] for number in numbers]
        return collate(rows, pad=self.pad, predictions=1.0, counted=[number < len(self.rows) for number in numbers])
