"""A bank of feed-forwards on rows sorted by expert, as one operation with a backward of its own.

What it saves over a grouped product, an activation and a second product, on a CPU: an expert's hidden units are
activated, dropped and differentiated while they are in the cache, in place; the backward needs one block of memory for
hidden units instead of several as long as all rows; the gradient of every matrix is written once, into its place in
the bank's; and experts without rows are passed over, in one filling of zeros for all neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.functional.activation import activation_function
from moekit.functional.random_bits import LEVELS, random_int16
from moekit.kernels.grouped_mm import checked_counts, zero_unused

_BLOCK = 128  # rows whose hidden units are activated together, where experts have few


def grouped_feed_forward_reference(
    rows: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts: Sequence[int],
    activation: str,
    factor: Tensor | None = None,
) -> Tensor:
    """The obvious form of `grouped_feed_forward`, by autograd; `factor` Float[R, F] multiplies the hidden units."""
    activate = activation_function(activation)
    factors = [None] * len(counts) if factor is None else factor.split(list(counts))
    out = []
    for e, block in enumerate(rows.split(list(counts))):
        hidden = block @ w_in[e]
        if b_in is not None:
            hidden = hidden + b_in[e]
        hidden = activate(hidden)
        if w_up is not None:
            hidden = hidden * (block @ w_up[e])
        if factors[e] is not None:
            hidden = hidden * factors[e]
        out.append(hidden @ w_out[e] if b_out is None else hidden @ w_out[e] + b_out[e])
    return torch.cat(out)


def takes(rows: Tensor, *parameters: Tensor | None) -> bool:
    """Whether `grouped_feed_forward` computes such tensors here: single or double precision on a CPU, in eager mode.

    Elsewhere the parts are apart: a graph wants operators that it knows, a GPU kernels, half precision its roundings.
    """
    if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float64):
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [t for t in parameters if t is not None]
    plain = type(rows) is Tensor and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return plain and all(t.dtype == rows.dtype and t.device.type == "cpu" for t in tensors)


def grouped_feed_forward(
    rows: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    counts: Tensor,
    *,
    activation: str,
    w_up: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """activation(x W_in + b_in) [* (x W_up)] W_out + b_out, each row by its expert's matrices.

    Args:
        rows: Float[R, D], sorted by expert; see `takes`.
        w_in: Float[E, D, F].
        w_out: Float[E, F, D].
        counts: Int64[E], rows of each expert; they sum to R. Experts may have none.
        activation: a name that `moekit.functional.activation` knows.
        w_up: Float[E, D, F] of gated experts, whose gate is `w_in`; None = not gated.
        b_in: Float[E, F]; None = none.
        b_out: Float[E, D]; None = none.
        dropout: probability, below 1, with which each hidden unit is zeroed, to the nearest 1 / 65,536; what stays is
            divided by 1 - `dropout`.

    Returns:
        Float[R, D]. Derivatives of any order; those above the first are computed by the reference.

    Raises:
        ValueError: if `counts` does not sum to R or has not one entry per matrix.
    """
    numbers = checked_counts(counts, rows.shape[0], w_in.shape[0])
    parts = (rows, w_in, w_up, w_out, b_in, b_out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parts):
        out: Tensor = _FeedForward.apply(*parts, numbers, activation, dropout)[0]
        return out
    return _forward(*parts, numbers, activation, dropout, keeps=False)[0]


@dataclass(frozen=True)
class _Activation:
    """An activation from and into given memory, and its derivative, written over the gradient.

    Attributes:
        needs_input: whether the derivative is of the activation's input; else its output will do.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor], object]
    needs_input: bool


_ATEN = torch.ops.aten
_ACTIVATIONS = {
    "relu": _Activation(
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda grad, y: _ATEN.threshold_backward.grad_input(grad, y, 0, grad_input=grad),
        needs_input=False,
    ),
    "gelu": _Activation(
        lambda x, out: _ATEN.gelu.out(x, approximate="tanh", out=out),
        lambda grad, x: _ATEN.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
        needs_input=True,
    ),
    "silu": _Activation(
        lambda x, out: _ATEN.silu.out(x, out=out),
        lambda grad, x: _ATEN.silu_backward.grad_input(grad, x, grad_input=grad),
        needs_input=True,
    ),
}


class _Dropout:
    """Which hidden units are dropped, decided by random bits; what stays is scaled where it is multiplied next."""

    def __init__(self, probability: float) -> None:
        self.dropped = round(probability * LEVELS)
        self.scale = 1.0 / (1.0 - probability) if self.dropped else 1.0

    def drop_(self, hidden: Tensor, drops: Tensor | None) -> None:
        """Zero some of ``hidden`` Float[R, F], and write down which, Bool[R, F], where wanted."""
        if not self.dropped:
            return
        bits = random_int16(hidden.numel(), hidden.device).view(hidden.shape)
        below = torch.lt(bits, self.dropped - LEVELS // 2, out=drops)
        hidden.masked_fill_(below, 0.0)


class _Bank:
    """The counts of a bank's rows, and the parts of tensors that belong to the experts that have any."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.used = [e for e, n in enumerate(counts) if n]
        self.sizes = [counts[e] for e in self.used]
        self.counts = counts
        self.blocks: list[tuple[range, slice]] = []  # numbers in `used`, and their rows
        first = start = end = 0
        for i, n in enumerate(self.sizes):
            end += n
            if end - start >= _BLOCK or i + 1 == len(self.sizes):
                self.blocks.append((range(first, i + 1), slice(start, end)))
                first, start = i + 1, end

    @property
    def widest(self) -> int:
        """Rows of the largest block."""
        return max((rows.stop - rows.start for _, rows in self.blocks), default=0)

    def rows(self, packed: Tensor) -> Sequence[Tensor]:
        """The rows of each used expert."""
        return packed.split(self.sizes) if self.sizes else ()

    def of(self, stacked: Tensor) -> list[Tensor]:
        """The matrix or vector of each used expert."""
        parts = stacked.unbind(0)
        return [parts[e] for e in self.used]

    def empty_like(self, stacked: Tensor) -> Tensor:
        """Memory for a gradient in which only the used experts' parts are to be written: the others are zeros."""
        out = torch.empty_like(stacked)
        zero_unused(out, self.counts)
        return out


_Saved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _forward(
    rows: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    counts: Sequence[int],
    activation: str,
    dropout: float,
    *,
    keeps: bool,
) -> _Saved:
    """``(out, hidden, pre, up, drops)``: the result, and, if `keeps`, what `_backward` asks for.

    `hidden` is what W_out is multiplied with, but for the scale of dropout; `pre` the activation's input, or its output
    where that will do; `up` = x W_up; `drops` which hidden units were dropped. Those that tell nothing new are None.
    """
    act, bank, drop = _ACTIVATIONS[activation], _Bank(counts), _Dropout(dropout)
    length = rows.shape[0] if keeps else bank.widest
    gated = w_up is not None

    def memory(wanted: bool = True, dtype: torch.dtype = rows.dtype) -> Tensor | None:
        return rows.new_empty(length, w_in.shape[2], dtype=dtype) if wanted else None

    hidden = memory()
    assert hidden is not None
    pre = memory(gated or (keeps and act.needs_input))
    up = memory(gated)
    drops = memory(keeps and drop.dropped > 0 and (gated or act.needs_input), torch.bool)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)

    x, y = bank.rows(rows), bank.rows(out)
    first, second = bank.of(w_in), bank.of(w_out)
    gate_up = bank.of(w_up) if w_up is not None else []
    bias_in = bank.of(b_in) if b_in is not None else []
    bias_out = bank.of(b_out) if b_out is not None else []
    for experts, where in bank.blocks:
        at = where if keeps else slice(0, where.stop - where.start)
        sizes = [bank.sizes[i] for i in experts]
        h = hidden[at]
        p = h if pre is None else pre[at]
        for i, tile in zip(experts, p.split(sizes), strict=True):
            if bias_in:
                torch.addmm(bias_in[i], x[i], first[i], out=tile)
            else:
                torch.mm(x[i], first[i], out=tile)
        if up is None:
            act.forward(p, h)
        else:
            for i, tile in zip(experts, up[at].split(sizes), strict=True):
                torch.mm(x[i], gate_up[i], out=tile)
            if act.needs_input:
                act.forward(p, h)
                h.mul_(up[at])
            else:
                act.forward(p, p)
                torch.mul(p, up[at], out=h)
        drop.drop_(h, None if drops is None else drops[at])
        for i, tile in zip(experts, h.split(sizes), strict=True):
            if bias_out:
                torch.addmm(bias_out[i], tile, second[i], alpha=drop.scale, out=y[i])
            elif drop.dropped:
                torch.addmm(y[i], tile, second[i], beta=0, alpha=drop.scale, out=y[i])
            else:
                torch.mm(tile, second[i], out=y[i])
    return (out, hidden, pre, up, drops) if keeps else (out, None, None, None, None)


def _backward(
    grad: Tensor,
    parts: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    wanted: Sequence[bool],
    counts: Sequence[int],
    activation: str,
    dropout: float,
) -> list[Tensor | None]:
    """Gradients of ``(rows, w_in, w_up, w_out, b_in, b_out)``, those `wanted`."""
    rows, w_in, w_up, w_out = parts[:4]
    hidden, pre, up, drops = saved
    assert rows is not None
    assert w_in is not None
    assert w_out is not None
    assert hidden is not None
    act, bank, drop = _ACTIVATIONS[activation], _Bank(counts), _Dropout(dropout)
    grad = grad.contiguous()
    d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if wanted[0] else None
    d_in, d_up, d_out, d_b_in, d_b_out = (
        bank.empty_like(t) if t is not None and want else None for t, want in zip(parts[1:], wanted[1:], strict=True)
    )
    scratch = rows.new_empty(bank.widest, w_in.shape[2])
    scratch_up = rows.new_empty(bank.widest, w_in.shape[2]) if up is not None else None

    def of(stacked: Tensor | None) -> list[Tensor]:
        return [] if stacked is None else bank.of(stacked)

    x, g = bank.rows(rows), bank.rows(grad)
    dx = bank.rows(d_rows) if d_rows is not None else ()
    in_t, out_t = of(w_in.transpose(1, 2)), of(w_out.transpose(1, 2))
    up_t = of(None if w_up is None else w_up.transpose(1, 2))
    to_in, to_up, to_out, to_b_in, to_b_out = of(d_in), of(d_up), of(d_out), of(d_b_in), of(d_b_out)
    deeper = any(wanted[i] for i in (0, 1, 2, 4))  # whether anything before the hidden units wants a gradient
    for experts, where in bank.blocks:
        sizes = [bank.sizes[i] for i in experts]
        if to_out:
            for i, tile in zip(experts, hidden[where].split(sizes), strict=True):
                if drop.dropped:
                    torch.addmm(to_out[i], tile.t(), g[i], beta=0, alpha=drop.scale, out=to_out[i])
                else:
                    torch.mm(tile.t(), g[i], out=to_out[i])
        for i in experts if to_b_out else ():
            torch.sum(g[i], 0, out=to_b_out[i])
        if not deeper:
            continue
        dh = scratch[: where.stop - where.start]
        tiles = dh.split(sizes)
        for i, tile in zip(experts, tiles, strict=True):
            if drop.dropped:
                torch.addmm(tile, g[i], out_t[i], beta=0, alpha=drop.scale, out=tile)
            else:
                torch.mm(g[i], out_t[i], out=tile)
        if drops is not None:
            dh.masked_fill_(drops[where], 0.0)
        up_tiles: Sequence[Tensor] = ()
        if up is not None:
            assert pre is not None
            assert scratch_up is not None
            du = scratch_up[: where.stop - where.start]
            if act.needs_input:
                act.forward(pre[where], du)
                du.mul_(dh)
            else:
                torch.mul(pre[where], dh, out=du)
            dh.mul_(up[where])
            up_tiles = du.split(sizes)
        # Where relu's output serves for its input, what was dropped is zero there, and its gradient is too.
        act.backward(dh, (hidden if pre is None else pre)[where])
        for n, (i, tile) in enumerate(zip(experts, tiles, strict=True)):
            if to_in:
                torch.mm(x[i].t(), tile, out=to_in[i])
            if to_b_in:
                torch.sum(tile, 0, out=to_b_in[i])
            if dx:
                torch.mm(tile, in_t[i], out=dx[i])
            if up_tiles:
                if to_up:
                    torch.mm(x[i].t(), up_tiles[n], out=to_up[i])
                if dx:
                    dx[i].addmm_(up_tiles[n], up_t[i])
    return [d_rows, d_in, d_up, d_out, d_b_in, d_b_out]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor,
        w_in: Tensor,
        w_up: Tensor | None,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        counts: Sequence[int],
        activation: str,
        dropout: float,
    ) -> _Saved:
        return _forward(rows, w_in, w_up, w_out, b_in, b_out, counts, activation, dropout, keeps=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
        ctx.save_for_backward(*inputs[:6], *output[1:])
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad, *_), settings = grads, ctx.settings
        if grad is None:
            return (None,) * 9
        tensors = ctx.saved_tensors  # asked for once: checkpointing gives them no second time
        parts, saved, wanted = tensors[:6], tensors[6:], ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # somebody wants to differentiate these gradients
            found = _by_autograd(grad, parts, saved, wanted, *settings)
        else:
            found = _backward(grad, parts, saved, wanted, *settings)
        return (*found, None, None, None)


def _by_autograd(
    grad: Tensor,
    parts: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    wanted: Sequence[bool],
    counts: Sequence[int],
    activation: str,
    dropout: float,
) -> list[Tensor | None]:
    """What `_backward` gives, from the reference, with a graph."""
    hidden, _, _, drops = saved
    drop, factor = _Dropout(dropout), None
    if drop.dropped:
        assert hidden is not None
        stays = hidden != 0 if drops is None else ~drops
        factor = stays.to(hidden.dtype) * drop.scale
    rows, w_in, w_up, w_out, b_in, b_out = parts
    assert rows is not None
    assert w_in is not None
    assert w_out is not None
    out = grouped_feed_forward_reference(rows, w_in, w_up, w_out, b_in, b_out, counts, activation, factor)
    inputs = [part for part, want in zip(parts, wanted, strict=True) if want and part is not None]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True, materialize_grads=True))
    return [next(found) if want and part is not None else None for part, want in zip(parts, wanted, strict=True)]
