"""Rows of a choice-major list of which nothing is dropped: sorted by expert, and summed again, without a scatter.

There every assignment has a row, and every row an assignment. So what elsewhere is a scattered addition into zeros, in
the sum and in the gradient of the sorting, is a gather. On a CPU these operations are bound by memory: each piece of
rows is gathered, multiplied and added while it lies in a core's cache. What `torch.func` transforms is not for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 17  # numbers of a piece: half a megabyte of float32


def take_rows_reference(x: Tensor, token: Tensor) -> Tensor:
    """The obvious form of `take_rows`."""
    return x.index_select(0, token)


def take_rows(x: Tensor, token: Tensor, row: Tensor, choices: int) -> Tensor:
    """Float[K * T, D]: the rows `token` of ``x`` Float[T, D].

    Args:
        x: on a CPU.
        token: Int64[K * T], the token of each row.
        row: Int64[K * T], the row of each assignment; all first choices in the order of tokens, then all second ones.
        choices: K.
    """
    rows: Tensor = _Take.apply(x, token, row, choices)
    return rows


def sum_rows_reference(y: Tensor, weight: Tensor, token: Tensor, row: Tensor, choices: int) -> Tensor:
    """The obvious form of `sum_rows`."""
    by_row = torch.empty_like(row).scatter(0, row, torch.arange(len(row)))
    return y.new_zeros(len(y) // choices, y.shape[1]).index_add(0, token, y * weight[by_row][:, None])


def sum_rows(y: Tensor, weight: Tensor, token: Tensor, row: Tensor, choices: int) -> Tensor:
    """Float[T, D]: the sum of each token's rows, times their weights.

    Args:
        y: Float[K * T, D], on a CPU.
        weight: Float[K * T] of the type of `y`, of each assignment.
        token: Int64[K * T], the token of each row.
        row: Int64[K * T], the row of each assignment, as in `take_rows`.
        choices: K.
    """
    out: Tensor = _Sum.apply(y, weight, token, row, choices)
    return out


def _pieces(rows: int, dim: int) -> Iterator[slice]:
    step = max(_PIECE // max(dim, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _gathered(rows: Tensor, row: Tensor, choices: int, weight: Tensor | None) -> Tensor:
    """Float[T, D]: the sum of the rows of each token's assignments, times a weight if there is one."""
    num_tokens = len(rows) // choices
    first, *others = row.view(choices, num_tokens).unbind(0)
    weights = [None] * choices if weight is None else weight.reshape(choices, num_tokens, 1).unbind(0)
    out = rows.new_empty(num_tokens, rows.shape[1])
    for piece in _pieces(num_tokens, rows.shape[1]):
        into = out[piece]
        torch.index_select(rows, 0, first[piece], out=into)
        if weights[0] is not None:
            into.mul_(weights[0][piece])
        for later, scale in zip(others, weights[1:], strict=True):
            found = rows.index_select(0, later[piece])
            if scale is None:
                into.add_(found)
            else:
                into.addcmul_(found, scale[piece])
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, row: Tensor, choices: int) -> Tensor:
        ctx.choices = choices
        ctx.save_for_backward(row)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            by_choice = grad.index_select(0, row).view(ctx.choices, len(row) // ctx.choices, grad.shape[1])
            return by_choice.sum(0), None, None, None
        return _gathered(grad, row, ctx.choices, None), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, token: Tensor, row: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(y, weight, token, row)
        return _gathered(y, row, choices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weight, token, row = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            assignment = torch.empty_like(row).scatter(0, row, torch.arange(len(row)))
            taken = grad.index_select(0, token)
            dots = (taken * y).sum(1).index_select(0, row)
            return taken * weight.index_select(0, assignment)[:, None], dots, None, None, None
        by_row = weight.new_empty(weight.shape).scatter_(0, row, weight)[:, None]
        dy, dots = y.new_empty(y.shape), weight.new_empty(weight.shape)
        room = y.new_empty(min(len(y), max(_PIECE // max(y.shape[1], 1), 1)), y.shape[1])
        for piece in _pieces(*y.shape):
            into, rows = dy[piece], y[piece]
            torch.index_select(grad, 0, token[piece], out=into)
            torch.sum(torch.mul(into, rows, out=room[: len(rows)]), 1, out=dots[piece])
            into.mul_(by_row[piece])
        return dy, dots.index_select(0, row), None, None, None
