"""When so few numbers are counted that Python is faster than a chain of tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.eager import is_eager

_MOST = 512  # beyond it a sort in Python takes as long as the operations that it spares


def is_few(tensor: Tensor, count: int | None = None) -> bool:
    """Whether `count` numbers (None = those of `tensor`) that lie beside `tensor` may be read and counted one by one.

    So it is in a step of decoding on a CPU. An operation on a few numbers takes as long as Python takes to count a
    hundred of them, longer where products with many weights have emptied the caches. Only without gradients, and where
    a read neither waits nor is recorded.
    """
    if torch.is_grad_enabled() or not is_eager():
        return False
    number = tensor.numel() if count is None else count
    return tensor.device.type == "cpu" and type(tensor) is Tensor and number <= _MOST
