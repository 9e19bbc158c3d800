"""Rows of token ids as batches: grouped by length, padded, on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Int64 of numbers, or of rows of them, on `device`.

    It comes from pinned memory where that is a GPU, so that the host need not wait for the copy.
    """
    made = torch.tensor(numbers, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Int64[B, longest], padded on the right, and its mask."""
    width = max(len(row) for row in rows)
    ids = to_device([[*row, *[pad] * (width - len(row))] for row in rows], device)
    lengths = to_device([len(row) for row in rows], device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def by_length(lengths: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the rows in batches of like length, of at most `batch_tokens` padded positions.

    A row has one length, or one for each side that is padded for itself; a longer row than that goes alone.
    """
    batch: list[int] = []
    widest: tuple[int, ...] = ()
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        wider = tuple(map(max, widest, lengths[i])) if batch else lengths[i]
        if batch and sum(wider) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], lengths[i]
        batch.append(i)
        widest = wider
    if batch:
        yield batch


def of_one_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the rows in batches without padding, the shortest rows first, of at most `batch_tokens` positions.

    A longer row than that goes alone.
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    for length, members in sorted(groups.items()):
        most = max(1, batch_tokens // length)
        yield from (members[begin : begin + most] for begin in range(0, len(members), most))
