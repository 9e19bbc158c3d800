"""Tensor parallelism: what partners that hold slices of a layer's weights say to each other.

Partners hold the same tokens. A layer whose hidden channels (or heads) are divided computes, on every partner, one
part of a sum: the output is summed in forward, the gradient of the input in backward. Nothing else changes, so the
layer's own code runs on its slices as it runs on the whole.

Source: arXiv:1909.08053 section 3 (the conjugate operators f and g).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moekit.transformer.embedding import Vocabulary


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: Sequence[dist.ProcessGroup], scale: float, gradient_scale: float
    ) -> Tensor:
        ctx.groups, ctx.gradient_scale = groups, gradient_scale
        return x.view_as(x) if scale == 1.0 else x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.contiguous()
        if ctx.groups or ctx.gradient_scale != 1.0:
            grad = grad * ctx.gradient_scale
        for group in ctx.groups:
            dist.all_reduce(grad, group=group)
        return grad, None, None, None


class _SumValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherLast(torch.autograd.Function):
    """Float[..., n] of every partner side by side, Float[..., W * n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every partner computed the whole loss, so each already has the whole gradient of its slice.
        return grad.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None


def sum_gradient(
    x: Tensor, groups: Sequence[dist.ProcessGroup], *, scale: float = 1.0, gradient_scale: float = 1.0
) -> Tensor:
    """``x * scale``, whose gradient is that of the result times `gradient_scale`, summed over `groups`, contiguous.

    With one group and no factors it is what enters a divided layer.
    """
    out: Tensor = _SumGradient.apply(x, groups, scale, gradient_scale)
    return out


def sum_value(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over `group`, whose gradient passes unchanged: what leaves a divided layer."""
    out: Tensor = _SumValue.apply(x, group)
    return out


class VocabParallel(Vocabulary):
    """A table of token vectors of which each partner holds a run of rows; see `TokenEmbedding.vocabulary`.

    Args:
        group: The tensor-parallel ranks, in order of their rows.

    Source: arXiv:1909.08053 section 3. Differs: logits are gathered before the loss, so any loss works.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def vectors(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Float[..., D] of ids Int64[...], by ``weight`` Float[V / W, D]."""
        rows = weight.shape[0]
        local = ids - self.group.rank() * rows
        here = (local >= 0) & (local < rows)
        found = F.embedding(torch.where(here, local, 0), weight)
        return sum_value(torch.where(here[..., None], found, 0.0), self.group)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Float[..., V] of ``hidden`` Float[..., D]."""
        out: Tensor = _GatherLast.apply(F.linear(sum_gradient(hidden, [self.group]), weight), self.group)
        return out
