"""Grouped products on a GPU: rows taken from where they lie, results put where they belong, epilogues in between.

Rows are sorted by expert. A program computes a tile of rows of one expert; which expert that is, it finds in the
counts, so that no number is read on the host. Every address is computed in int64. Nothing is added atomically: what a
program writes, no other writes.

Legend: R rows, E experts, I and O inner and outer size of a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.kernels.gpu.language import ceil_div, float32_products, jit, launch, power_of_two, tl, widened

_GROUP = 8  # tiles of rows that share their matrices' tiles in the cache


class Blocks(NamedTuple):
    """Shape of the tiles of a kernel.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        inner: how many numbers of a row and a column a step multiplies.
        warps: warps of a program.
        stages: how many steps are loaded ahead.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def blocks_for(x: Tensor, num_rows: int, num_experts: int) -> Blocks:
    """Tiles for rows of that type and number.

    As high as an expert's even share, between 16 and 128: what a tile has more than the expert has rows is computed for
    nothing. Three stages where a multiprocessor has 160 KiB of shared memory or more, two where it has 100 KiB (compute
    capability 8.6, 8.9, 12.0).
    """
    rows = min(128, power_of_two(num_rows // max(num_experts, 1), 16))
    stages = 3 if capability(x.device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else 2
    if x.dtype == torch.float32:
        return Blocks(min(rows, 64), 64, 32, 4, stages)
    return Blocks(rows, 128, 64, 8 if rows == 128 else 4, stages)


def _narrow(blocks: Blocks) -> Blocks:
    """Half as wide, where an epilogue holds several tiles: ptxas spilled registers of whole ones."""
    return blocks._replace(columns=min(blocks.columns, 64))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an A100 for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@jit
def _tile_of(counts, experts, tile, E2: tl.constexpr, ROWS: tl.constexpr):
    """Expert of a tile of rows, its first row, and the row behind the expert's last; nothing behind the last tile."""
    e = tl.arange(0, E2)
    n = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    tiles = (n + (ROWS - 1)) // ROWS
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = e < expert
    start = tl.sum(tl.where(before, n, 0), 0)
    first = start + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * ROWS
    end = start + tl.sum(tl.where(e == expert, n, 0), 0)
    return expert, first, end


@jit
def _swizzled(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile of rows and tile of columns of a program: neighbours share what they read."""
    width = GROUP * tiles_n
    first = (program // width) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (program % width) % size, (program % width) // size


@jit
def _dot(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _rows_times_matrix(
    acc, x, rows, w, columns, inner, outer, x_row, w_inner, w_outer,
    BI: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of `acc` and x[rows] w[:, columns]; `w` points at the expert's matrix, `rows` are int64 and all there."""
    i = tl.arange(0, BI)
    left = x + rows[:, None] * x_row + i[None, :]
    right = w + i.to(tl.int64)[:, None] * w_inner + columns.to(tl.int64)[None, :] * w_outer
    for step in range(0, inner, BI):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            there = step + i < inner
            a = tl.load(left, mask=there[None, :], other=0.0)
            b = tl.load(right, mask=there[:, None] & (columns < outer)[None, :], other=0.0)
        acc = _dot(a, b, acc, WIDEN, PRECISION)
        left += BI
        right += BI * w_inner
    return acc


@jit
def _product_kernel(
    x, w, x2, w2, out, counts, source, target, scale,
    experts, inner, outer, tiles_m, tiles_n, x_row, out_row, w_expert, w_inner, w_outer,
    PAIR: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, SCALE: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = _swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = _tile_of(counts, experts, m, E2, BM)
    if first < end:
        row = first + tl.arange(0, BM)
        known = tl.minimum(row, end - 1).to(tl.int64)  # rows behind the last are read as the last, and not written
        taken = tl.load(source + known) if GATHER else known
        columns = n * BN + tl.arange(0, BN)
        place = expert.to(tl.int64) * w_expert
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = _rows_times_matrix(
            acc, x, taken, w + place, columns, inner, outer, x_row, w_inner, w_outer, BI, EVEN, WIDEN, PRECISION
        )
        if PAIR:
            acc = _rows_times_matrix(
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
    blocks: Blocks | None = None,
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
        blocks: shape of tiles; None = `blocks_for`.

    Returns:
        `out`.
    """
    (experts, inner, outer), rows = weight.shape, x.shape[0] if num_rows is None else num_rows
    out = x.new_empty(rows, outer) if out is None else out
    b = blocks or blocks_for(x, rows, experts)
    x2, w2 = pair or (x, weight)
    assert weight.stride() == w2.stride()
    tiles_m, tiles_n = _row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    launch(
        _product_kernel, (tiles_m * tiles_n,),
        x, weight, x2, w2, out, counts, _or(source, counts), _or(target, counts), _or(scale, counts),
        experts, inner, outer, tiles_m, tiles_n, x.stride(0), out.stride(0), *weight.stride(),
        warps=b.warps, stages=b.stages, PAIR=pair is not None, GATHER=source is not None, SCATTER=target is not None,
        SCALE=scale is not None, EVEN=_even(inner, outer, b), **_common(experts, b),
    )  # fmt: skip
    return out


@jit
def _activated(x, ACT: tl.constexpr):
    """The activation of float32 numbers, and its derivative."""
    if ACT == "relu":
        y = tl.maximum(x, 0.0)
        slope = (x > 0).to(tl.float32)
    elif ACT == "silu":
        s = tl.sigmoid(x)
        y = x * s
        slope = s * (1.0 + x * (1.0 - s))
    else:  # gelu, its tanh form: (1 + tanh u) / 2 is the sigmoid of 2 u
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * s
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return y, slope


@jit
def _hidden_kernel(
    x, w_in, w_up, pre, up, hidden, counts, source,
    experts, inner, outer, tiles_m, tiles_n, x_row, w_expert, w_inner, w_outer,
    GLU: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = _swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = _tile_of(counts, experts, m, E2, BM)
    if first < end:
        row = first + tl.arange(0, BM)
        known = tl.minimum(row, end - 1).to(tl.int64)
        taken = tl.load(source + known)
        columns = n * BN + tl.arange(0, BN)
        place = expert.to(tl.int64) * w_expert
        i = tl.arange(0, BI)
        left = x + taken[:, None] * x_row + i[None, :]
        right = w_in + place + i.to(tl.int64)[:, None] * w_inner + columns.to(tl.int64)[None, :] * w_outer
        other = w_up + place + i.to(tl.int64)[:, None] * w_inner + columns.to(tl.int64)[None, :] * w_outer
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc_up = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, inner, BI):
            if EVEN:
                a, b = tl.load(left), tl.load(right)
            else:
                there = step + i < inner
                both = there[:, None] & (columns < outer)[None, :]
                a = tl.load(left, mask=there[None, :], other=0.0)
                b = tl.load(right, mask=both, other=0.0)
            acc = _dot(a, b, acc, WIDEN, PRECISION)
            if GLU:
                if EVEN:
                    c = tl.load(other)
                else:
                    c = tl.load(other, mask=both, other=0.0)
                acc_up = _dot(a, c, acc_up, WIDEN, PRECISION)
                other += BI * w_inner
            left += BI
            right += BI * w_inner
        written = (row < end)[:, None] & (columns < outer)[None, :]
        # The tile's place is one int64 number, places inside it are int32: a register each.
        base, to = first.to(tl.int64) * outer, tl.arange(0, BM)[:, None] * outer + columns[None, :]
        # Rounded before the activation, as backward will read it.
        rounded = acc.to(hidden.dtype.element_ty)
        y, _ = _activated(rounded.to(tl.float32), ACT)
        if KEEP:
            tl.store(pre + base + to, rounded, mask=written)
        if GLU:
            rounded_up = acc_up.to(hidden.dtype.element_ty)
            y = y * rounded_up.to(tl.float32)
            if KEEP:
                tl.store(up + base + to, rounded_up, mask=written)
        tl.store(hidden + base + to, y.to(hidden.dtype.element_ty), mask=written)


class Hidden(NamedTuple):
    """Hidden units of rows.

    Attributes:
        hidden: Float[R, F], activated.
        pre: Float[R, F], before the activation, for backward; of a "relu" without a gate it is `hidden`, whose
            activation and slope are the same.
        up: Float[R, F], what a gate multiplies; None without one.
    """

    hidden: Tensor
    pre: Tensor
    up: Tensor | None


def hidden_units(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    counts: Tensor,
    source: Tensor,
    activation: str,
    *,
    keep: bool,
    blocks: Blocks | None = None,
) -> Hidden:
    """activation(x[source] w_in), times x[source] w_up where there is one.

    Args:
        x: Float[T, D], the last dimension contiguous.
        w_in: Float[E, D, F].
        w_up: Float[E, D, F] of the same strides, or None.
        counts: Int64[E], rows of each expert.
        source: Int64[R], where each row lies in `x`.
        activation: "relu", "gelu" or "silu".
        keep: whether what backward needs is written.
        blocks: shape of tiles; None = `blocks_for`.
    """
    (experts, inner, outer), rows = w_in.shape, source.shape[0]
    hidden = x.new_empty(rows, outer)
    keep = keep and not (activation == "relu" and w_up is None)
    pre = torch.empty_like(hidden) if keep else hidden
    up = None if w_up is None else torch.empty_like(hidden) if keep else hidden
    b = blocks or blocks_for(x, rows, experts)
    if w_up is not None:
        b = b if capability(x.device)[0] >= 9 else _narrow(b)  # wgmma keeps the factors out of registers
        assert w_up.stride() == w_in.stride()
    tiles_m, tiles_n = _row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    launch(
        _hidden_kernel, (tiles_m * tiles_n,),
        x, w_in, _or(w_up, w_in), pre, _or(up, hidden), hidden, counts, source,
        experts, inner, outer, tiles_m, tiles_n, x.stride(0), *w_in.stride(),
        warps=b.warps, stages=b.stages, GLU=w_up is not None, KEEP=keep, ACT=activation, EVEN=_even(inner, outer, b),
        **_common(experts, b),
    )  # fmt: skip
    return Hidden(hidden, pre, up)


@jit
def _hidden_grad_kernel(
    grad, w_out, scale, pre, up, d_pre, d_up, weighed, dots, counts, source,
    experts, inner, outer, tiles_m, tiles_n, grad_row, w_expert, w_inner, w_outer,
    GLU: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, E2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = _swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = _tile_of(counts, experts, m, E2, BM)
    if first < end:
        row = first + tl.arange(0, BM)
        known = tl.minimum(row, end - 1).to(tl.int64)
        columns = n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = _rows_times_matrix(
            acc, grad, tl.load(source + known), w_out + expert.to(tl.int64) * w_expert, columns, inner, outer,
            grad_row, w_inner, w_outer, BI, EVEN, WIDEN, PRECISION,
        )  # fmt: skip
        written = (row < end)[:, None] & (columns < outer)[None, :]
        base, at = first.to(tl.int64) * outer, tl.arange(0, BM)[:, None] * outer + columns[None, :]
        kind = d_pre.dtype.element_ty
        weight = tl.load(scale + known)[:, None]
        y, slope = _activated(tl.load(pre + base + at, mask=written, other=0.0).to(tl.float32), ACT)
        if GLU:
            times = tl.load(up + base + at, mask=written, other=0.0).to(tl.float32)
            tl.store(d_up + base + at, (weight * acc * y).to(kind), mask=written)
            slope = slope * times
            y = y * times
        tl.store(d_pre + base + at, (weight * acc * slope).to(kind), mask=written)
        tl.store(weighed + base + at, (weight * y).to(kind), mask=written)
        # Masked as well: what stands behind the last column is whatever a matrix of another expert begins with.
        share = tl.sum(tl.where(written, acc * y, 0.0), 1)
        tl.store(dots + known * tiles_n + n, share, mask=row < end)


class HiddenGrads(NamedTuple):
    """What a gradient of the outputs makes of hidden units.

    Attributes:
        d_pre: Float[R, F], gradient before the activation.
        d_up: Float[R, F], gradient of what the gate multiplies; None without a gate.
        weighed: Float[R, F], hidden units times their row's weight: the left factor of the gradient of w_out.
        d_scale: Float32[R], gradient of the rows' weights. <grad, hidden w_out> is taken as <grad w_out^T, hidden>, so
            that the outputs need not be kept.
    """

    d_pre: Tensor
    d_up: Tensor | None
    weighed: Tensor
    d_scale: Tensor


def hidden_grads(
    grad: Tensor,
    w_out: Tensor,
    scale: Tensor,
    kept: Hidden,
    counts: Tensor,
    source: Tensor,
    activation: str,
    *,
    blocks: Blocks | None = None,
) -> HiddenGrads:
    """Backward through ``scale (activation(pre) up) w_out``, up to the hidden units.

    Args:
        grad: Float[T, D], gradient of the tokens, the last dimension contiguous.
        w_out: Float[E, F, D].
        scale: Float32[R], the rows' weights.
        kept: what `hidden_units` returned.
        counts: Int64[E], rows of each expert.
        source: Int64[R], the token of each row.
        activation: "relu", "gelu" or "silu".
        blocks: shape of tiles; None = `blocks_for`.
    """
    (experts, outer, inner), rows = w_out.shape, source.shape[0]
    b = _narrow(blocks or blocks_for(grad, rows, experts))
    tiles_m, tiles_n = _row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    d_pre, weighed = torch.empty_like(kept.pre), torch.empty_like(kept.pre)
    d_up = None if kept.up is None else torch.empty_like(kept.pre)
    dots = torch.empty(rows, tiles_n, dtype=torch.float32, device=grad.device)
    launch(
        _hidden_grad_kernel, (tiles_m * tiles_n,),
        grad, w_out, scale, kept.pre, _or(kept.up, kept.pre), d_pre, _or(d_up, d_pre), weighed, dots, counts, source,
        experts, inner, outer, tiles_m, tiles_n, grad.stride(0), w_out.stride(0), w_out.stride(2), w_out.stride(1),
        warps=b.warps, stages=b.stages, GLU=d_up is not None, ACT=activation, EVEN=_even(inner, outer, b),
        **_common(experts, b),
    )  # fmt: skip
    return HiddenGrads(d_pre, d_up, weighed, dots.sum(1))


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
        acc = _dot(a, b, acc, WIDEN, PRECISION)
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
    blocks: Blocks | None = None,
) -> Tensor:
    """Float[E, I, O]: for each expert the sum over its rows of x[x_source[r]] (outer product) y[y_source[r]].

    Exactly zero for an expert without rows. Sums are float32, in the order of the rows.

    Args:
        x: Float[T, I], the last dimension contiguous.
        y: Float[T', O], the last dimension contiguous.
        counts: Int64[E], rows of each expert.
        x_source: Int64[R], where each row lies in `x`; None = in order.
        y_source: Int64[R], where each row lies in `y`; None = in order.
        dtype: of the result; None = that of `x`.
        blocks: shape of tiles; None = `blocks_for` of many rows.
    """
    experts, left, right = counts.shape[0], x.shape[1], y.shape[1]
    out = x.new_empty(experts, left, right, dtype=dtype or x.dtype)
    b = blocks or blocks_for(x, 128 * experts, experts)
    tiles_m, tiles_n = ceil_div(left, b.rows), ceil_div(right, b.columns)
    launch(
        _matrix_grad_kernel, (tiles_m * tiles_n, experts),
        x, y, out, counts, _or(x_source, counts), _or(y_source, counts), experts, left, right, tiles_n,
        x.stride(0), y.stride(0), warps=b.warps, stages=b.stages,
        X_GATHER=x_source is not None, Y_GATHER=y_source is not None, **_common(experts, b),
    )  # fmt: skip
    return out


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, *, blocks: Blocks | None = None) -> Tensor:
    """`moekit.kernels.grouped_mm` by these kernels; its reference is `moekit.kernels.grouped_mm_reference`."""
    out: Tensor = _GroupedProduct.apply(x, weight, counts, blocks)
    return out


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, blocks: Blocks | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, counts)
        ctx.blocks = blocks
        return product(x, weight, counts, blocks=blocks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(grad, weight.transpose(1, 2), counts, blocks=ctx.blocks)
        if ctx.needs_input_grad[1]:
            dw = matrix_grad(x, grad, counts, dtype=weight.dtype, blocks=ctx.blocks)
        return dx, dw, None, None


def _row_tiles(rows: int, experts: int, height: int) -> int:
    """Tiles of rows that there are at most, however rows are spread over experts."""
    return min(rows, ceil_div(rows, height) + experts - 1)


def _even(inner: int, outer: int, blocks: Blocks) -> bool:
    return inner % blocks.inner == 0 and outer % blocks.columns == 0


def _common(experts: int, b: Blocks) -> dict[str, Any]:
    return {
        "WIDEN": widened(), "PRECISION": float32_products(), "E2": power_of_two(experts),
        "BM": b.rows, "BN": b.columns, "BI": b.inner, "GROUP": _GROUP,
    }  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for a kernel that will not follow it."""
    return other if tensor is None else tensor
