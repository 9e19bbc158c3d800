"""A router that learns nothing and balances perfectly: for benchmarks, and as the control of an ablation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.routers.queueing import batch_capacity, routing_of_choices
from moekit.routing import Capacity, Compensation, Router, Routing, RoutingContext


class UniformRouter(Router):
    """Deal the real tokens to the experts one after the other, like cards; every weight is 1 / k.

    No two experts differ by more than one assignment, whatever T, k and padding are, so a benchmark that uses it
    measures the layer and not the luck of its router.

    Args:
        num_experts: E.
        k: experts per token, all different.
        order: "round_robin" deals in token order, always. "random" shuffles the deal in training, from torch's
            generator; evaluation deals in token order.
        capacity: slots per expert; dropless by default. At a factor of 1 nothing is dropped.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Raises:
        ValueError: if `k` is not in 1..E, `order` is unknown, or `capacity` is a `SequenceCapacity`.

    Source: ours.
    """

    expert_dims: ClassVar[Mapping[str, int]] = {}

    shown = ("num_experts", "k", "order", "capacity")
    by_position = True
    dim = None

    def __init__(
        self,
        num_experts: int,
        k: int = 1,
        *,
        order: Literal["round_robin", "random"] = "round_robin",
        capacity: Capacity | None = None,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}.")
        if order not in ("round_robin", "random"):
            raise ValueError(f'order must be "round_robin" or "random": got {order!r}.')
        self.num_experts, self.k = num_experts, k
        self.order, self.capacity = order, batch_capacity(capacity, "UniformRouter")
        self.looks_ahead = self.capacity.looks_ahead
        self.allow_future = allow_future

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: a token is dealt copies of the experts that it had."""
        return Compensation()

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        t, device = x.shape[0], x.device
        mask = None if context is None else context.mask
        real = torch.ones(t, dtype=torch.bool, device=device) if mask is None else mask
        if self.order == "random" and self.training:
            shuffled = torch.rand(t, dtype=torch.float32, device=device).argsort()
            turn = torch.empty_like(shuffled).scatter(0, shuffled, real[shuffled].to(torch.int64).cumsum(0) - 1)
        else:
            turn = real.to(torch.int64).cumsum(0) - 1
        expert = (turn.clamp_min(0)[:, None] * self.k + torch.arange(self.k, device=device)) % self.num_experts
        weight = torch.full((t, self.k), 1 / self.k, dtype=torch.float32, device=device)
        return routing_of_choices(
            expert, weight, self.num_experts, mask=mask, capacity=self.capacity, training=self.training
        )
