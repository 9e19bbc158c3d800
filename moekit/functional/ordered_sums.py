"""Sums by index whose last bits do not change between runs."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Float[size, ...]: the sum of the rows of ``values`` [R, ...] with each index of ``index`` Int64[R].

    On a GPU by a form that sorts: `Tensor.index_add` adds there in any order, and of three summands and more the last
    bits change from run to run.
    """
    out = torch.zeros(size, *values.shape[1:], dtype=values.dtype, device=values.device)
    if values.device.type == "cuda":
        return out.index_put((index,), values, accumulate=True)
    return out.index_add(0, index, values)
