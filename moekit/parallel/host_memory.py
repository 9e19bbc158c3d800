"""Copies between a device and host memory that wait for the device once, not once a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each in host memory, pinned of what is on a GPU; all are there when it returns.

    `copy_` from them back to the GPU may be ``non_blocking``: the device reads them while the host goes on. Who writes
    to them afterwards calls this first, which waits for that too.
    """
    on_gpu = {tensor.device for tensor in tensors if tensor.device.type == "cuda" and torch.cuda.is_available()}
    copies = []
    for tensor in tensors:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device in on_gpu)
        copies.append(copy.copy_(tensor, non_blocking=True))
    for device in on_gpu:
        torch.cuda.current_stream(device).synchronize()  # host read: all of them at once
    return copies
