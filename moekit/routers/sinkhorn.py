"""Sinkhorn routing (S-BASE): a balanced plan picks the experts in training, the scores alone in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.functional.drawing import truncated_normal_
from moekit.functional.losses import router_z
from moekit.functional.precision import wide_linear
from moekit.functional.sinkhorn import sinkhorn
from moekit.routers.queueing import clear_padding, mask_choices, score_statistics, serve, token_choices
from moekit.routing import Capacity, Compensation, Router, Routing, RoutingContext


class SinkhornRouter(Router):
    """The k best experts of a token in the balanced plan of its batch; weight = softmax or sigmoid of the score.

    Training: P = sinkhorn(x W_r), whose columns all sum to T / E; the k largest of row t are its experts. Evaluation:
    the k largest scores, without a plan, so that a token's experts depend on no other token. The plan has no gradient:
    the router learns through the weight alone. No balance loss is needed.

    Args:
        dim: D.
        num_experts: E.
        k: choices per token.
        activation: what makes a weight of a score. "softmax" over all experts, or "sigmoid" of each, as BASE layers
            and, for k = 1, Megatron-LM have it.
        capacity: slots per expert; dropless by default. The plan is balanced, its argmax nearly so.
        iterations: most sweeps of `moekit.functional.sinkhorn`.
        tol: its tolerance.
        init_scale: variance scale of the truncated normal init.
        allow_future: in training the plan weighs a token against later ones, so a causal decoder refuses this router
            unless told that the leak is wanted.

    Returns in `Routing.losses`: ``router_z``; in `Routing.statistics`: ``entropy`` and ``logsumexp``.

    Source: arXiv:2202.01169 (S-BASE); Megatron-LM's sinkhorn load balancing (plan in
        float32, without gradient, in training only).
    """

    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    looks_ahead = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        capacity: Capacity | None = None,
        iterations: int = 100,
        tol: float = 1e-4,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}.")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f'activation must be "softmax" or "sigmoid": got {activation!r}.')
        if iterations < 1 or tol < 0:
            raise ValueError(
                f"SinkhornRouter needs iterations of at least 1 and tol of at least 0: got {iterations} and {tol}."
            )
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.activation, self.capacity = activation, capacity or Capacity()
        self.iterations, self.tol = iterations, tol
        self.init_scale = init_scale
        self.allow_future = allow_future
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the scores' weights anew: truncated normal of std sqrt(init_scale / dim)."""
        truncated_normal_(self.weight, self.weight.shape[1], self.init_scale)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, activation={self.activation!r}"

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`; in evaluation, where there is no plan."""
        return Compensation.of_best(self.k, copies, divided=self.activation == "softmax")

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route; see `Router.forward`."""
        mask = None if context is None else context.mask
        logits = wide_linear(clear_padding(x, mask), self.weight)
        probs = logits.softmax(-1)
        scores = logits.detach()
        if self.training:
            scores = sinkhorn(scores, mask, iterations=self.iterations, tol=self.tol)
        expert = scores.topk(self.k, dim=-1).indices
        weight = (probs if self.activation == "softmax" else logits.sigmoid()).gather(1, expert)
        wanted = mask_choices(torch.ones_like(expert, dtype=torch.bool), mask)
        served = serve(
            expert, wanted, weight, self.num_experts, self.capacity, training=self.training, all_wanted=mask is None
        )
        losses = {"router_z": router_z(logits, mask)}
        return token_choices(expert, weight, served, self.num_experts, losses, score_statistics(logits, probs, mask))
