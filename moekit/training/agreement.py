"""What processes agree on between two steps, without a word to a device."""

from __future__ import annotations

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from moekit.parallel.mesh import host_group


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
    timeout = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=host_group("callbacks", timeout))
    return [float(value) for value in found.tolist()]
