"""What processes agree on between two steps, without a word to a device."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from moekit.parallel.mesh import host_group

T = TypeVar("T")


def agree(trainer: L.Trainer, *values: float) -> list[float]:
    """The largest of each value over all processes; all must call it, with equally many.

    The numbers travel through host memory. Asked over nccl, every question would make the host wait for all kernels
    that it has started.

    Args:
        trainer: whose processes are asked.
        *values: numbers, or truths; float64.
    """
    if trainer.world_size == 1:
        return [float(value) for value in values]
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_group(trainer))
    return [float(value) for value in found.tolist()]


def everybody(trainer: L.Trainer, value: T) -> list[T]:
    """The value of each process, in the order of ranks, by way of host memory; all must call it. Plain data alone."""
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(found, value, group=_group(trainer))
    return found


def _group(trainer: L.Trainer) -> dist.ProcessGroup:
    return host_group("callbacks", getattr(trainer.strategy, "_timeout", None) or default_pg_timeout)
