"""A vector of each expert for every one of its rows, with a gradient that is the same in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.functional.eager import is_transformed


def repeat_rows(values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """The e-th row of `values`, ``counts[e]`` times, one expert after the other.

    Args:
        values: Float[E, F], such as the biases of experts.
        counts: Int64[E], rows of each expert; they sum to `num_rows`.
        num_rows: R, so that nothing is read from a device.

    Returns:
        Float[R, F]. On a GPU the gradient of `values` is summed in float32 and in a fixed order: the gradient of
        `torch.repeat_interleave` is a scattered addition there, in any order and in the type of `values`, where bf16
        stops growing at 256 times a summand.
    """
    if torch.compiler.is_exporting() or is_transformed():  # in operations that every format has
        expert = (torch.arange(num_rows, device=values.device)[:, None] >= counts.cumsum(0)).sum(1)
        return values[expert]
    if values.device.type != "cuda":
        return values.repeat_interleave(counts, dim=0, output_size=num_rows)
    repeated: Tensor = _Repeat.apply(values, counts, num_rows)
    return repeated


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(counts)
        return values.repeat_interleave(counts, dim=0, output_size=num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (counts,) = ctx.saved_tensors
        (grad,) = grads
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        # `unsafe` leaves out a look at the counts, for which the host would wait.
        total = torch.segment_reduce(wide, "sum", lengths=counts, axis=0, unsafe=True)
        return total.to(grad.dtype), None, None
