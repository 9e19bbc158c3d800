"""A bank of two-layer or gated experts as one operation on tokens: gather, products, activation, weighted sum.

Products take rows from where the tokens lie. With one choice, results go weighted to their tokens; with more, each
token sums its rows in the order of its choices. Backward keeps the units before the activation, never the experts'
outputs, and writes no permuted copy of tokens or of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.kernels.first_order import refuse_second_order
from moekit.kernels.gpu.hidden import Hidden, hidden_grads, hidden_units
from moekit.kernels.gpu.products import matrix_grad, product
from moekit.kernels.gpu.rows import RowOrder, gather_rows
from moekit.kernels.gpu.tiles import Tiles


def feed_forward(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    order: RowOrder,
    activation: str,
    *,
    dtype: torch.dtype | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """y_t = sum over kept assignments n of token t of weight_n (activation(x_t w_in[e_n]) [x_t w_up[e_n]]) w_out[e_n].

    Args:
        x: Float[T, D].
        weight: Float32[N], choice-major.
        w_in: Float[E, D, F], of the type of `x`.
        w_up: Float[E, D, F] of experts with a gate, whose gate is `w_in`; None of two-layer ones.
        w_out: Float[E, F, D].
        order: places of the assignments; see `moekit.kernels.gpu.rows.row_order`.
        activation: "relu", "gelu" (tanh form) or "silu".
        dtype: type of the result; None = that of `x`.
        tiles: shape of tiles; None = by sizes.

    Returns:
        Float[T, D], zeros for a token of which nothing was kept. Sums over choices are float32.
    """
    out: Tensor = _FeedForward.apply(x, weight, w_in, w_up, w_out, order, activation, dtype or x.dtype, tiles)
    return out


def feed_forward_reference(
    x: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    order: RowOrder,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The obvious form of `feed_forward`, by autograd: one assignment after the other, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    expert = torch.arange(order.counts.shape[0], device=x.device).repeat_interleave(order.counts).tolist()
    out = [torch.zeros_like(x[0], dtype=wide) for _ in range(x.shape[0])]
    for n, row in enumerate(order.row.tolist()):
        if row >= 0:
            t, e = n % x.shape[0], expert[row]
            hidden = activation(x[t].to(wide) @ w_in[e].to(wide))
            if w_up is not None:
                hidden = hidden * (x[t].to(wide) @ w_up[e].to(wide))
            out[t] = out[t] + weight[n].to(wide) * (hidden @ w_out[e].to(wide))
    return torch.stack(out).to(x.dtype) if out else torch.zeros_like(x)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        w_in: Tensor,
        w_up: Tensor | None,
        w_out: Tensor,
        order: RowOrder,
        activation: str,
        dtype: torch.dtype,
        tiles: Tiles | None,
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        w_in, w_up = _alike(w_in, w_up)
        keep = any(ctx.needs_input_grad)
        units = hidden_units(x, w_in, w_up, order.counts, order.token, activation, keep=keep, tiles=tiles)
        scale = weight[order.assignment]
        rows = order.row.shape[0]
        if order.choices == 1:
            out = x.new_zeros(x.shape, dtype=dtype)  # a token whose choice was dropped has no row
            product(
                units.hidden, w_out, order.counts, num_rows=rows, target=order.token, scale=scale, out=out,
                tiles=tiles,
            )  # fmt: skip
        else:
            y = product(units.hidden, w_out, order.counts, num_rows=rows, tiles=tiles)
            out = gather_rows(y, order.row, weight, choices=order.choices, dtype=dtype)
        if keep:
            ctx.save_for_backward(x, scale, w_in, w_up, w_out, units.pre, units.up)
            ctx.order, ctx.activation, ctx.tiles = order, activation, tiles
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("Triton's sparse layer", 'backend="torch"')
        x, scale, w_in, w_up, w_out, pre, up = ctx.saved_tensors
        order, tiles = ctx.order, ctx.tiles
        grad = grad.to(x.dtype).contiguous()
        counts, token, rows = order.counts, order.token, order.row.shape[0]
        kept = Hidden(pre, pre, up)
        g = hidden_grads(grad, w_out, scale, kept, counts, token, ctx.activation, tiles=tiles)
        needs_x, needs_weight, needs_in, needs_up, needs_out = ctx.needs_input_grad[:5]
        dx = d_weight = d_in = d_up = d_out = None
        if needs_weight:
            d_weight = torch.where(order.row >= 0, g.d_scale[order.row.clamp_min(0)], 0.0)
        if needs_out:
            d_out = matrix_grad(g.weighed, grad, counts, y_source=token, dtype=w_out.dtype, tiles=tiles)
        if needs_x:
            second = None
            if g.d_up is not None:
                second = (g.d_up, w_up.transpose(1, 2))
            where: dict[str, Any] = {"target": token, "out": torch.zeros_like(x)} if order.choices == 1 else {}
            dx = product(
                g.d_pre, w_in.transpose(1, 2), counts, num_rows=rows, pair=second, tiles=tiles, **where
            )  # fmt: skip
            if order.choices > 1:
                dx = gather_rows(dx, order.row, choices=order.choices)
        if needs_in:
            d_in = matrix_grad(x, g.d_pre, counts, x_source=token, dtype=w_in.dtype, tiles=tiles)
        if needs_up and g.d_up is not None:
            d_up = matrix_grad(x, g.d_up, counts, x_source=token, dtype=w_in.dtype, tiles=tiles)
        return dx, d_weight, d_in, d_up, d_out, None, None, None, None


def _alike(w_in: Tensor, w_up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both matrices with the same strides, which the kernels that read both are told once."""
    if w_up is None or w_in.stride() == w_up.stride():
        return w_in, w_up
    return w_in.contiguous(), w_up.contiguous()
