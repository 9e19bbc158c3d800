"""The slow, obvious Mixture of Experts that every fast path is tested against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moekit.routing import Routing


def moe_reference(x: Tensor, routing: Routing, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """y_t = sum over kept assignments (t, e) of weight * expert_e(x_t), one assignment after the other, in float32.

    Args:
        x: Float[T, D].
        routing: who goes where.
        expert: ``expert(e, rows)`` computes expert e on Float[1, D].

    Returns:
        Float[T, D] of the type of `x`; zeros for a token of which nothing was kept.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = [torch.zeros_like(x[t], dtype=wide) for t in range(routing.num_tokens)]
    for n in range(routing.token.numel()):
        if bool(routing.kept[n]):
            t, e = int(routing.token[n]), int(routing.expert[n])
            y = expert(e, x[t : t + 1])[0]
            rows[t] = rows[t] + y.to(wide) * routing.weight[n].to(wide)
    return torch.stack(rows).to(x.dtype) if rows else torch.zeros_like(x)
