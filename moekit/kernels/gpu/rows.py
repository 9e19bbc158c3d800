"""Rows of tokens on a GPU: sorted by expert, and summed again token by token, in the order of its choices.

Nothing is added atomically: each token sums its own K rows, so that two runs are equal to the last bit.

Legend: T tokens, K choices, N = K T assignments, all first choices first, R rows, D dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.kernels.first_order import refuse_second_order
from moekit.kernels.gpu.language import ceil_div, jit, launch, power_of_two, tl
from moekit.routing import Routing


class RowOrder(NamedTuple):
    """Where assignments stand once they are sorted by expert; found without a number read on the host.

    Attributes:
        counts: Int64[E], rows of each expert.
        row: Int64[N], the row of each assignment; -1 = it has none.
        assignment: Int64[N], the assignment of each row; 0 behind the last row.
        token: Int64[N], the token of each row; 0 behind the last row.
        choices: K.
    """

    counts: Tensor
    row: Tensor
    assignment: Tensor
    token: Tensor
    choices: int


def row_order(routing: Routing) -> RowOrder:
    """The order of a routing whose list is choice-major."""
    assert routing.choices is not None
    kept, expert = routing.kept, routing.expert
    counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=expert.device)
    counts = counts.index_add(0, expert, kept.to(torch.int64))
    # An expert's kept assignments hold the places 0..n-1 of its queue, so the row of each is known without a sort.
    row = torch.where(kept, (counts.cumsum(0) - counts)[expert] + routing.position, -1)
    listed = expert.numel()
    number = torch.arange(listed, device=expert.device)
    # One place behind all others takes what is not kept.
    slots = torch.zeros(listed + 1, dtype=torch.int64, device=expert.device)
    assignment = slots.scatter(0, torch.where(kept, row, listed), number)[:listed]
    return RowOrder(counts, row, assignment, routing.token[assignment], routing.choices)


@jit
def _gather_kernel(
    rows, out, index, weight, size, dim, rows_row,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    here, within = t < size, d < dim
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(index + k * size + t, mask=here, other=-1)
        there = (row >= 0)[:, None] & within[None, :]
        value = tl.load(rows + row[:, None] * rows_row + d[None, :], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weight + k * size + t, mask=here & (row >= 0), other=0.0)[:, None]
        acc += value
    at = t.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here[:, None] & within[None, :])


def gather_rows(
    rows: Tensor, index: Tensor, weight: Tensor | None = None, *, choices: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Float[S, D]: for each s the sum over k of weight[k S + s] rows[index[k S + s]], in float32 and in this order.

    Args:
        rows: Float[R, D], the last dimension contiguous.
        index: Int64[choices * S]; -1 = nothing, whatever `weight` holds there.
        weight: Float32[choices * S]; None = 1.
        choices: summands of each row.
        dtype: type of the result; None = that of `rows`.
    """
    size, dim = index.shape[0] // choices, rows.shape[1]
    out = rows.new_empty(size, dim, dtype=dtype or rows.dtype)
    wide = min(256, power_of_two(dim, 16))
    high = 2048 // wide
    launch(
        _gather_kernel, (ceil_div(size, high), ceil_div(dim, wide)),
        rows, out, index, index if weight is None else weight, size, dim, rows.stride(0),
        K=choices, WEIGHTED=weight is not None, BT=high, BD=wide,
    )  # fmt: skip
    return out


def gather_rows_reference(
    rows: Tensor, index: Tensor, weight: Tensor | None = None, *, choices: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """The obvious form of `gather_rows`, by autograd."""
    taken = rows.to(torch.promote_types(rows.dtype, torch.float32))[index.clamp_min(0)]
    if weight is not None:
        taken = taken * weight[:, None]
    taken = torch.where((index >= 0)[:, None], taken, 0.0)
    return taken.view(choices, -1, rows.shape[1]).sum(0).to(dtype or rows.dtype)


@jit
def _dots_kernel(
    rows, grad, out, index, listed, size, dim, rows_row, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    here = n < listed
    row = tl.load(index + n, mask=here, other=-1)
    token = (n % size).to(tl.int64)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for first in range(0, dim, BD):
        d = first + tl.arange(0, BD)
        there = (row >= 0)[:, None] & (d < dim)[None, :]
        a = tl.load(rows + row[:, None] * rows_row + d[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(grad + token[:, None] * dim + d[None, :], mask=there, other=0.0).to(tl.float32)
        acc += tl.sum(a * b, 1)
    tl.store(out + n, acc, mask=here)


def _dots(rows: Tensor, grad: Tensor, index: Tensor) -> Tensor:
    """Float32[N]: <rows[index[n]], grad[n mod S]>; 0 where the index is -1."""
    out = torch.empty(index.shape[0], dtype=torch.float32, device=rows.device)
    wide = min(256, power_of_two(rows.shape[1], 16))
    launch(
        _dots_kernel, (ceil_div(index.shape[0], 2048 // wide),),
        rows, grad, out, index, index.shape[0], grad.shape[0], rows.shape[1], rows.stride(0),
        BN=2048 // wide, BD=wide,
    )  # fmt: skip
    return out


def permute(x: Tensor, order: RowOrder) -> Tensor:
    """``x`` Float[T, D] as rows sorted by expert: Float[N, D], of which those behind the last are copies of token 0.

    Their gradients are not looked at. That of a token is the sum of its rows', in the order of its choices.
    """
    rows: Tensor = _Permute.apply(x, order)
    return rows


def permute_reference(x: Tensor, order: RowOrder) -> Tensor:
    """The obvious form of `permute`, by autograd."""
    there = torch.arange(order.token.shape[0], device=x.device) < order.counts.sum()
    return torch.where(there[:, None], x[order.token], x.detach()[order.token])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return gather_rows(x.contiguous(), order.token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_order("Triton's permuted rows", 'backend="torch"')
        return gather_rows(grad.contiguous(), ctx.order.row, choices=ctx.order.choices), None


def unpermute(y: Tensor, weight: Tensor, order: RowOrder, *, dtype: torch.dtype | None = None) -> Tensor:
    """Float[T, D] in `dtype`: the weighted sum of each token's rows, zeros for a token of which nothing was kept.

    Args:
        y: Float[R, D], the experts' rows.
        weight: Float32[N] of the assignments.
        order: where their rows are.
        dtype: type of the result; None = float32.
    """
    out: Tensor = _Unpermute.apply(y, weight, order, dtype or torch.float32)
    return out


def unpermute_reference(y: Tensor, weight: Tensor, order: RowOrder, *, dtype: torch.dtype | None = None) -> Tensor:
    """The obvious form of `unpermute`, by autograd."""
    wide = dtype or torch.promote_types(y.dtype, torch.float32)
    return gather_rows_reference(y, order.row, weight, choices=order.choices, dtype=wide)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, order: RowOrder, dtype: torch.dtype) -> Tensor:
        y, weight = y.contiguous(), weight.contiguous()
        ctx.save_for_backward(y, weight)
        ctx.order = order
        return gather_rows(y, order.row, weight, choices=order.choices, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_second_order("Triton's weighted sum of rows", 'backend="torch"')
        y, weight = ctx.saved_tensors
        order, grad = ctx.order, grad.contiguous()
        dy = dw = None
        if ctx.needs_input_grad[0]:
            rows = y.shape[0]
            dy = gather_rows(grad, order.token[:rows], weight[order.assignment[:rows]], dtype=y.dtype)
        if ctx.needs_input_grad[1]:
            dw = _dots(y, grad, order.row)
        return dy, dw, None, None
