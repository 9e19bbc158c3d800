"""Copies between a device and host memory that wait for the device once, not once a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_on_host(like: Tensor) -> Tensor:
    """Memory of the host for a tensor like it: pinned where that is on a GPU, which then copies by itself."""
    pinned = like.device.type == "cuda" and torch.cuda.is_available()
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each in host memory; all are there when it returns.

    `copy_` from them back to the GPU may be ``non_blocking``: the device reads them while the host goes on. Who writes
    to them afterwards calls this first, which waits for that too.
    """
    copies = [empty_on_host(tensor).copy_(tensor, non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        if torch.cuda.is_available():
            torch.cuda.current_stream(device).synchronize()  # host read: all of them at once
    return copies
