"""Grouped products on a GPU: rows taken from where they lie, results put where they belong.

Nothing is added atomically: what a program writes, no other writes.

Legend: R rows, E experts, I and O inner and outer size of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekit.kernels.first_order import refuse_second_order
from moekit.kernels.gpu.language import ceil_div, jit, launch, tl
from moekit.kernels.gpu.tiles import (
    Tiles,
    common,
    dot,
    even,
    pointer,
    row_tiles,
    rows_times_matrix,
    swizzled,
    tile_of,
    tiles_for,
)


@jit
def _product_kernel(
    x, w, x2, w2, out, counts, source, target, scale,
    experts, inner, outer, tiles_m, tiles_n, x_row, out_row, w_expert, w_inner, w_outer,
    PAIR: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = tile_of(counts, experts, m, E2, BM)
    if first < end:
        row = first + tl.arange(0, BM)
        known = tl.minimum(row, end - 1).to(tl.int64)  # rows behind the last are read as the last, and not written
        taken = tl.load(source + known) if GATHER else known
        columns = n * BN + tl.arange(0, BN)
        place = expert.to(tl.int64) * w_expert
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = rows_times_matrix(
            acc, x, taken, w + place, columns, inner, outer, x_row, w_inner, w_outer, BI, EVEN, WIDEN, PRECISION
        )
        if PAIR:
            acc = rows_times_matrix(
                acc, x2, taken, w2 + place, columns, inner, outer, x_row, w_inner, w_outer, BI, EVEN, WIDEN, PRECISION
            )
        if SCALE:
            acc = acc * tl.load(scale + known)[:, None]
        written = (row < end)[:, None] & (columns < outer)[None, :]
        if SCATTER:
            to = out + tl.load(target + known)[:, None] * out_row + columns[None, :]
        else:
            to = out + first.to(tl.int64) * out_row + (tl.arange(0, BM)[:, None] * out_row + columns[None, :])
        tl.store(to, acc.to(out.dtype.element_ty), mask=written)


def product(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    num_rows: int | None = None,
    source: Tensor | None = None,
    target: Tensor | None = None,
    scale: Tensor | None = None,
    pair: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """out[target[r]] = scale[r] (x[source[r]] w_e + x2[source[r]] w2_e), for each row r of expert e.

    Args:
        x: Float[T, I], the last dimension contiguous.
        weight: Float[E, I, O] of any strides.
        counts: Int64[E], rows of each expert.
        num_rows: R, at least the sum of `counts`; None = T. Rows behind the sum are neither read nor written.
        source: Int64[R], where each row lies in `x`; None = in order.
        target: Int64[R], where each row goes, no two to one place; None = in order.
        scale: Float32[R]; None = 1.
        pair: a second `x` and `weight` of the same shapes and strides, whose product is added.
        out: Float[S, O], contiguous; None = a new one Float[R, O] of the type of `x`.
        tiles: shape of tiles; None = `tiles_for`.

    Returns:
        `out`.
    """
    (experts, inner, outer), rows = weight.shape, x.shape[0] if num_rows is None else num_rows
    out = x.new_empty(rows, outer) if out is None else out
    b = tiles or tiles_for(x, rows, experts)
    x2, w2 = pair or (x, weight)
    assert weight.stride() == w2.stride()
    tiles_m, tiles_n = row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    launch(
        _product_kernel, (tiles_m * tiles_n,),
        x, weight, x2, w2, out, counts, pointer(source, counts), pointer(target, counts), pointer(scale, counts),
        experts, inner, outer, tiles_m, tiles_n, x.stride(0), out.stride(0), *weight.stride(),
        warps=b.warps, stages=b.stages, PAIR=pair is not None, GATHER=source is not None, SCATTER=target is not None,
        SCALE=scale is not None, EVEN=even(inner, outer, b), **common(experts, b),
    )  # fmt: skip
    return out


@jit
def _matrix_grad_kernel(
    x, y, out, counts, x_source, y_source, experts, left, right, tiles_n, x_row, y_row,
    X_GATHER: tl.constexpr, Y_GATHER: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n, expert = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tl.program_id(1)
    e = tl.arange(0, E2)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    start = tl.sum(tl.where(e < expert, count, 0), 0)
    end = start + tl.sum(tl.where(e == expert, count, 0), 0)
    i, j = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)  # and so it stays for an expert without rows
    for step in range(start, end, BI):
        row = step + tl.arange(0, BI)
        there = row < end
        known = tl.minimum(row, end - 1).to(tl.int64)
        in_x = tl.load(x_source + known) if X_GATHER else known
        in_y = tl.load(y_source + known) if Y_GATHER else known
        a = tl.load(x + in_x[None, :] * x_row + i[:, None], mask=there[None, :] & (i < left)[:, None], other=0.0)
        b = tl.load(y + in_y[:, None] * y_row + j[None, :], mask=there[:, None] & (j < right)[None, :], other=0.0)
        acc = dot(a, b, acc, WIDEN, PRECISION)
    at = (expert.to(tl.int64) * left + i.to(tl.int64)[:, None]) * right + j[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(i < left)[:, None] & (j < right)[None, :])


def matrix_grad(
    x: Tensor,
    y: Tensor,
    counts: Tensor,
    *,
    x_source: Tensor | None = None,
    y_source: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Float[E, I, O]: for each expert the sum over its rows of x[x_source[r]] (outer product) y[y_source[r]].

    Exactly zero for an expert without rows. Sums are float32, in the order of the rows.

    Args:
        x: Float[T, I], the last dimension contiguous.
        y: Float[T', O], the last dimension contiguous.
        counts: Int64[E], rows of each expert.
        x_source: Int64[R], where each row lies in `x`; None = in order.
        y_source: Int64[R], where each row lies in `y`; None = in order.
        dtype: type of the result; None = that of `x`.
        tiles: shape of tiles; None = `tiles_for` of many rows.
    """
    experts, left, right = counts.shape[0], x.shape[1], y.shape[1]
    out = x.new_empty(experts, left, right, dtype=dtype or x.dtype)
    b = tiles or tiles_for(x, 128 * experts, experts)
    tiles_m, tiles_n = ceil_div(left, b.rows), ceil_div(right, b.columns)
    launch(
        _matrix_grad_kernel, (tiles_m * tiles_n, experts),
        x, y, out, counts, pointer(x_source, counts), pointer(y_source, counts), experts, left, right, tiles_n,
        x.stride(0), y.stride(0), warps=b.warps, stages=b.stages,
        X_GATHER=x_source is not None, Y_GATHER=y_source is not None, **common(experts, b),
    )  # fmt: skip
    return out


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """`moekit.kernels.grouped_mm` by these kernels; its reference is `moekit.kernels.grouped_mm_reference`."""
    out: Tensor = _GroupedProduct.apply(x, weight, counts, tiles)
    return out


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, tiles: Tiles | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, counts)
        ctx.tiles = tiles
        return product(x, weight, counts, tiles=tiles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_second_order("Triton's grouped product", 'backend="torch"')
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(grad, weight.transpose(1, 2), counts, tiles=ctx.tiles)
        if ctx.needs_input_grad[1]:
            dw = matrix_grad(x, grad, counts, dtype=weight.dtype, tiles=ctx.tiles)
        return dx, dw, None, None
