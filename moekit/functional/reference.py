"""The slow, obvious Mixture of Experts that every fast path is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moekit.routing import Routing


def moe_reference(x: Tensor, routing: Routing, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """y_t = sum over kept assignments (t, e) of weight * expert_e(x_t), one assignment after the other.

    Args:
        x: Float[T, D].
        routing: who goes where.
        expert: ``expert(e, rows)`` computes expert e on Float[1, D].

    Returns:
        Float[T, D]; zeros for a token of which nothing was kept.
    """
    rows = [torch.zeros_like(x[t]) for t in range(routing.num_tokens)]
    for n in range(routing.token.numel()):
        if bool(routing.kept[n]):
            t, e = int(routing.token[n]), int(routing.expert[n])
            y = expert(e, x[t : t + 1])[0]
            rows[t] = rows[t] + (y * routing.weight[n]).to(x.dtype)
    return torch.stack(rows) if rows else torch.zeros_like(x)
