"""Attention of a few queries to many keys, as in a step of decoding on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.eager import is_eager

_MOST = 8  # queries of a row and head up to which the plain form was faster


def suits(query: Tensor) -> bool:
    """Whether `attend` is the faster form for `query` Float[B, H, Q, C]: on a CPU, of few queries, without gradients.

    Torch's kernel for the CPU calls a product for each row and head, which costs more than these small products take.
    """
    if torch.is_grad_enabled() or not is_eager():  # in a graph the number of queries may be a symbol
        return False
    exact = query.dtype in (torch.float32, torch.float64)
    return query.device.type == "cpu" and exact and query.shape[2] <= _MOST


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, as two batched products.

    Args:
        query: Float[B, H, Q, C].
        key: Float[B, H, K, C].
        value: Float[B, H, K, C].
        mask: Bool (True = visible) or Float (added), broadcastable to ``[B, H, Q, K]``; None = all are visible. What
            sees nothing becomes zeros.
        scale: None = 1 / sqrt(C).

    Returns:
        Float[B, H, Q, C].
    """
    rows, heads, queries, _ = query.shape
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    flat, keys = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    if mask is not None and mask.dtype != torch.bool:
        added = mask.expand(rows, heads, queries, key.shape[2]).flatten(0, 1)
        weights = torch.baddbmm(added, flat, keys, alpha=scale).softmax(-1)
        if queries == key.shape[2]:  # nothing is cached: a row may be all padding
            weights = weights.masked_fill_(added.isneginf().all(-1, keepdim=True), 0.0)
    else:
        scores = torch.bmm(flat * scale, keys)
        if mask is None:
            weights = scores.softmax(-1)
        else:
            hidden = (~mask).expand(rows, heads, queries, key.shape[2]).flatten(0, 1)
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0.0)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, queries, value.shape[3])


def added_mask(mask: Tensor, heads: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """A mask as what `attend` adds, for many calls; and the values with zeros for what sees nothing.

    Args:
        mask: Bool[B, 1, 1, K], True = visible.
        heads: H.
        value: Float[B, H, K, C].

    Returns:
        Float[B, H, 1, K] and Float[B, H, K, C].
    """
    blind = ~mask.any(-1, keepdim=True)
    added = value.new_zeros(mask.shape).masked_fill_(~(mask | blind), -torch.inf)
    if bool(blind.any()):
        value = value.masked_fill(blind, 0.0)
    return added.expand(-1, heads, -1, -1).contiguous(), value
