"""Random integers of few bits, of which a CPU draws several at once."""

from __future__ import annotations

import torch

LEVELS = 1 << 16
"""How many values an entry of `random_int16` has."""


def random_int16(count: int, device: torch.device) -> torch.Tensor:
    """Int16[count], uniform over all 65,536 values, drawn four at a time from the generator of `device`."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    return words.random_(-(1 << 63), None).view(torch.int16)[:count]
