"""Dropout that is not the slowest elementwise operation of a CPU step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16  # of a random number of 16 bits
_COARSE = 1 / 1024  # rates nearer to 0 or 1 are left to torch: 16 bits would round them by more than one percent


def dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """Zero each entry with `probability` and divide the others by 1 - probability; nothing outside of training.

    On a CPU, torch draws Bernoulli variables one by one; a draw of 64 bits decides on four entries here, which is
    several times faster. Such a rate is a multiple of 1/65536, at most 1/131072 from `probability`, and the others are
    divided by what is left of it, so that the mean of an entry is exactly its value. The bits are of torch's generator.
    Elsewhere, in compiled graphs, and for rates below 1/1024 or above 1023/1024, it is `F.dropout`.

    Raises:
        ValueError: if `probability` is not in [0, 1].

    Source: arXiv:1207.0580.
    """
    if not training or probability == 0.0:
        return x
    if not _packed(x, probability):
        return F.dropout(x, probability)
    return x * dropout_factor(x, probability)


def add_dropped(x: Tensor, update: Tensor, probability: float, *, training: bool) -> Tensor:
    """``x + dropout(update)``, a residual branch's end, in one pass where `dropout` draws packed bits."""
    if (
        training
        and probability
        and x.dtype == update.dtype
        and x.shape == update.shape
        and _packed(update, probability)
    ):
        return torch.addcmul(x, update, dropout_factor(update, probability))
    return x + dropout(update, probability, training=training)


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
        out = dropout_factor(x, probability).mul_(x).relu_()
        ctx.save_for_backward(out)
        ctx.scale = _scale(probability)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0) * ctx.scale, None


def dropout_factor(x: Tensor, probability: float) -> Tensor:
    """What `dropout` multiplies `x` by, in its type and shape: 0, or one over the share of entries that stay.

    Args:
        x: only its shape, type and device matter.
        probability: the rate; rounded to 1/65536.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    # Comparing in place and then widening takes a third of the time that a comparison into booleans does.
    kept = words.view(torch.int16)[: x.numel()].ge_(_dropped(probability) - _LEVELS // 2)
    return kept.view(x.shape).to(x.dtype).mul_(_scale(probability))


def _dropped(probability: float) -> int:
    """How many of the random numbers drop an entry."""
    return round(probability * _LEVELS)


def _scale(probability: float) -> float:
    """What the entries that stay are multiplied by."""
    return _LEVELS / (_LEVELS - _dropped(probability))


def _packed(x: Tensor, probability: float) -> bool:
    return x.device.type == "cpu" and _COARSE <= probability <= 1 - _COARSE and not torch.compiler.is_compiling()
