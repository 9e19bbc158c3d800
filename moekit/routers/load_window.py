"""Load counted over one optimizer step: over its micro-batches, and on request over all processes.

Source: arXiv:2501.11873 section 3 (counts kept over the micro-batches of a step); arXiv:2408.15664 (bias by the load
of the whole batch).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class LoadWindow:
    """Int64 counts of what this process has seen since the last optimizer step; owned by a router that observes.

    Not a buffer: a counter must not be cast with the parameters or overwritten by the broadcast of another process, and
    a checkpoint has no use for it, as it holds no gradients of a half-made step either.

    Args:
        size: how many counts.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        """Add ``counts`` Int64[size] of a micro-batch."""
        self.counts = counts if self.counts is None else self.counts + counts

    def clear(self) -> None:
        """Forget: the step is done."""
        self.counts = None

    def summed(self, device: torch.device) -> Tensor:
        """Int64[size]: the counts of all processes together; every process must ask."""
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        if self.counts is not None:
            counts += self.counts
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        return counts
