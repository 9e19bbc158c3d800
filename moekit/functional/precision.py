"""Scores in float32, whatever the precision around."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for `device`; nothing where the device knows no autocast (meta)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type to which autocast turns both factors of products of `x`; None = it does nothing.

    It is off, or the device knows none (meta), or `x` is of float64, which it leaves alone.
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on and x.dtype != torch.float64 else None


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 (or float64 where `x` is), also under autocast and in a bf16 model.

    Args:
        x: Float[T, D].
        weight: Float[E, D].

    Returns:
        Float32[T, E], or Float64.

    Source: arXiv:2101.03961 section 2.4 ("selective precision").
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):  # entering the context takes longer than asking
        return F.linear(x.to(wide), weight.to(wide))
    with without_autocast(x.device):
        return F.linear(x.to(wide), weight.to(wide))
