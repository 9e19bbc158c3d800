"""Attention of a few queries to many keys, as in a step of decoding on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 8  # queries of a row and head up to which the plain form was faster


def suits(query: Tensor) -> bool:
    """Whether `attend` is the faster form for `query` Float[B, H, Q, C]: on a CPU, of few queries, without gradients.

    Torch's kernel for the CPU calls a product for each row and head, which costs more than these small products take.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # in a graph the number of queries may be a symbol
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
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-1, -2))
    if mask is None:
        return torch.matmul(scores.softmax(-1), value)
    if mask.dtype != torch.bool:
        scores += mask
        return torch.matmul(scores.softmax(-1), value)
    hidden = ~mask
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    return torch.matmul(weights.masked_fill_(hidden, 0.0), value)
