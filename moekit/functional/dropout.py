"""Dropout that is not the slowest elementwise operation of a CPU step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.functional.activation import Activation, activation_function
from moekit.functional.eager import is_symbolic

_COARSE = 1 / 32  # rates nearer to 0 or 1 take 16 random bits for an entry, others 8
_COARSEST = 1 / 1024  # rates nearer still are left to torch
_CHOICE = 53  # bits that choose between two rates


def dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """Zero each entry with `probability` and divide the others by 1 - probability; nothing outside of training.

    On a CPU, torch draws Bernoulli variables one by one; a draw of 64 bits decides on eight entries here, which is
    several times faster. A call has one of the two multiples of 1/256 around `probability` as its rate (of 1/65536
    below 1/32 and above 31/32), drawn so that each entry is zero with `probability`, and divides the others by what
    is left of that rate. The bits are of torch's generator. Elsewhere, in compiled graphs and under `torch.func`, and
    for rates below 1/1024 or above 1023/1024, it is `F.dropout`.

    Raises:
        ValueError: if `probability` is not in [0, 1].

    Source: arXiv:1207.0580.
    """
    if not training or probability == 0.0:
        return x
    if not _packed(x, probability):
        return F.dropout(x, probability)
    kept, scale = _draw(x, probability)
    return x * kept.mul_(scale)


def add_dropped(x: Tensor, update: Tensor, probability: float, *, training: bool) -> Tensor:
    """``x + dropout(update)``, a residual branch's end, in one pass where `dropout` draws packed bits."""
    if (
        training
        and probability
        and x.dtype == update.dtype
        and x.shape == update.shape
        and _packed(update, probability)
    ):
        kept, scale = _draw(update, probability)
        return torch.addcmul(x, update, kept.mul_(scale))
    return x + dropout(update, probability, training=training)


def activation_dropout(x: Tensor, activation: Activation, probability: float, *, training: bool) -> Tensor:
    """``dropout(activation(x))``, which keeps as little for the backward as the activation allows.

    Raises:
        ValueError: if there is no such activation, or `probability` is not in [0, 1].
    """
    if activation == "relu":  # of which nothing but the result is kept
        return relu_dropout(x, probability, training=training)
    return dropout(activation_function(activation)(x), probability, training=training)


def relu_dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """``dropout(relu(x))``, which keeps only its result for the backward where `dropout` draws packed bits.

    The result is positive exactly where the entry was positive and stayed, so that neither the activation nor the
    random factor has to be kept: of a feed-forward these are its two largest tensors.
    """
    if not training or probability == 0.0 or not _packed(x, probability):
        return dropout(F.relu(x), probability, training=training)
    out: Tensor = _ReluDropout.apply(x, probability)
    return out


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        kept, ctx.scale = _draw(x, probability)
        out = kept.mul_(ctx.scale).mul_(x).relu_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0) * ctx.scale, None


def _draw(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """1 for each entry of `x` that stays and 0 for the others, in its type; and one over the share that should stay."""
    bits, lanes = (8, torch.int8) if _COARSE <= probability <= 1 - _COARSE else (16, torch.int16)
    count, levels = x.numel(), 1 << bits
    drawn = torch.empty(-(-count * bits // 64) + 1, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    below, rest = divmod(probability * levels, 1)
    choice = int(drawn[-1]) % (1 << _CHOICE)  # host read: none, it is a CPU's
    dropped = int(below) + (choice < rest * (1 << _CHOICE))
    # Comparing in place and then widening takes a third of the time that a comparison into booleans does.
    kept = drawn.view(lanes)[:count].ge_(dropped - levels // 2)
    return kept.view(x.shape).to(x.dtype), levels / (levels - dropped)


def _packed(x: Tensor, probability: float) -> bool:
    here = x.device.type == "cpu" and _COARSEST <= probability <= 1 - _COARSEST
    return here and not is_symbolic()
