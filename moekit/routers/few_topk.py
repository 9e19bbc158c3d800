"""`TopKRouter` in a step of decoding where it is plain and drops nothing: the same list by a few operations."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.assignment import queue_positions
from moekit.routing import Routing


def few_routing(logits: Tensor, k: int, renormalise: str) -> Routing:
    """The dropless routing of a `TopKRouter` that sends all its choices, without losses and statistics.

    Args:
        logits: Float32[T, E] of few real tokens.
        k: choices per token.
        renormalise: the router's argument of that name; where nothing is dropped its two ways are one.
    """
    t, num_experts = logits.shape
    weight, expert = logits.softmax(-1).topk(k, dim=-1)
    if renormalise != "none":
        weight = weight / weight.sum(-1, keepdim=True)
    token = torch.arange(t, device=logits.device)
    listed, kept = expert.t().reshape(-1), torch.ones(t * k, dtype=torch.bool, device=logits.device)
    return Routing(
        token=token if k == 1 else token.repeat(k),
        expert=listed,
        weight=weight.t().reshape(-1),
        position=queue_positions(listed, kept, num_experts),
        kept=kept,
        num_tokens=t,
        num_experts=num_experts,
        choices=k,
        all_kept=True,
    )
