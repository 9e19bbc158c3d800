"""Hidden units of experts on a GPU: products of rows that end in the activation, and the way back through it.

Legend: R rows, E experts, D width of tokens, F hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.kernels.gpu.language import ceil_div, jit, launch, tl
from moekit.kernels.gpu.tiles import (
    Tiles,
    capability,
    common,
    dot,
    even,
    narrow,
    pointer,
    row_tiles,
    rows_times_matrix,
    swizzled,
    tile_of,
    tiles_for,
)


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
    m, n = swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = tile_of(counts, experts, m, E2, BM)
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
            acc = dot(a, b, acc, WIDEN, PRECISION)
            if GLU:
                if EVEN:
                    c = tl.load(other)
                else:
                    c = tl.load(other, mask=both, other=0.0)
                acc_up = dot(a, c, acc_up, WIDEN, PRECISION)
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
    tiles: Tiles | None = None,
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
        tiles: shape of tiles; None = `tiles_for`.
    """
    (experts, inner, outer), rows = w_in.shape, source.shape[0]
    hidden = x.new_empty(rows, outer)
    keep = keep and not (activation == "relu" and w_up is None)
    pre = torch.empty_like(hidden) if keep else hidden
    up = None if w_up is None else torch.empty_like(hidden) if keep else hidden
    b = tiles or tiles_for(x, rows, experts)
    if w_up is not None:
        b = b if capability(x.device)[0] >= 9 else narrow(b)  # wgmma keeps the factors out of registers
        assert w_up.stride() == w_in.stride()
    tiles_m, tiles_n = row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    launch(
        _hidden_kernel, (tiles_m * tiles_n,),
        x, w_in, pointer(w_up, w_in), pre, pointer(up, hidden), hidden, counts, source,
        experts, inner, outer, tiles_m, tiles_n, x.stride(0), *w_in.stride(),
        warps=b.warps, stages=b.stages, GLU=w_up is not None, KEEP=keep, ACT=activation, EVEN=even(inner, outer, b),
        **common(experts, b),
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
    m, n = swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, first, end = tile_of(counts, experts, m, E2, BM)
    if first < end:
        row = first + tl.arange(0, BM)
        known = tl.minimum(row, end - 1).to(tl.int64)
        columns = n * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc = rows_times_matrix(
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
    tiles: Tiles | None = None,
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
        tiles: shape of tiles; None = `tiles_for`.
    """
    (experts, outer, inner), rows = w_out.shape, source.shape[0]
    b = narrow(tiles or tiles_for(grad, rows, experts))
    tiles_m, tiles_n = row_tiles(rows, experts, b.rows), ceil_div(outer, b.columns)
    d_pre, weighed = torch.empty_like(kept.pre), torch.empty_like(kept.pre)
    d_up = None if kept.up is None else torch.empty_like(kept.pre)
    dots = torch.empty(rows, tiles_n, dtype=torch.float32, device=grad.device)
    launch(
        _hidden_grad_kernel, (tiles_m * tiles_n,),
        grad, w_out, scale, kept.pre, pointer(kept.up, kept.pre), d_pre, pointer(d_up, d_pre), weighed, dots,
        counts, source,
        experts, inner, outer, tiles_m, tiles_n, grad.stride(0), w_out.stride(0), w_out.stride(2), w_out.stride(1),
        warps=b.warps, stages=b.stages, GLU=d_up is not None, ACT=activation, EVEN=even(inner, outer, b),
        **common(experts, b),
    )  # fmt: skip
    return HiddenGrads(d_pre, d_up, weighed, dots.sum(1))
