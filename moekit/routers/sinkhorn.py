"""Sinkhorn routing (S-BASE): a balanced plan picks the experts in training, the scores alone in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from moekit.functional.losses import router_z
from moekit.functional.sinkhorn import sinkhorn
from moekit.routers.queueing import batch_capacity, clear_padding, routing_of_choices, score_statistics
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routing import Capacity, Compensation, Routing, RoutingContext


class SinkhornRouter(ScoredRouter):
    """The k best experts of a token in the balanced plan of its batch; weight = softmax or sigmoid of the score.

    Training: P = sinkhorn(logits), whose columns all sum to T / E; the k largest of row t are its experts. Evaluation:
    the k largest scores, without a plan, so that a token's experts depend on no other token. The plan has no gradient:
    the router learns through the weight alone. No balance loss is needed.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        k: choices per token.
        activation: what makes a weight of a score. "softmax" over all experts, or "sigmoid" of each, as BASE layers
            and, for k = 1, Megatron-LM have it.
        capacity: slots per expert; dropless by default. The plan is balanced, its argmax nearly so.
        iterations: largest number of sweeps of `moekit.functional.sinkhorn`.
        tol: relative error of the plan at which the sweeps end.
        allow_future: accept this router in a causal decoder, although in training its plan weighs a token against later
            ones.

    Returns in `Routing.losses`: ``router_z``; in `Routing.statistics`: ``entropy`` and ``logsumexp``.

    Raises:
        ValueError: if `k` is not in 1..E, `activation` is unknown, `iterations` is less than 1, `tol`
            negative, or `capacity` a `SequenceCapacity`.

    Source: arXiv:2202.01169 (S-BASE); Megatron-LM's sinkhorn load balancing (plan in
        float32, without gradient, in training only).
    """

    shown = ("dim", "num_experts", "k", "activation")
    looks_ahead = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        scorer: ExpertScorer | None = None,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        capacity: Capacity | None = None,
        iterations: int = 100,
        tol: float = 1e-4,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}.")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f'activation must be "softmax" or "sigmoid": got {activation!r}.')
        if iterations < 1 or tol < 0:
            raise ValueError(
                f"SinkhornRouter needs iterations of at least 1 and tol of at least 0: got {iterations} and {tol}."
            )
        self.k = k
        self.activation, self.capacity = activation, batch_capacity(capacity, "SinkhornRouter")
        self.iterations, self.tol = iterations, tol
        self.allow_future = allow_future

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`; in evaluation, where there is no plan."""
        return Compensation.of_best(self.k, copies, divided=self.activation == "softmax")

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        mask = context.mask
        logits = self.logits(clear_padding(x, mask), context)
        probs = logits.softmax(-1)
        scores = logits.detach()
        if self.training:
            scores = sinkhorn(scores, mask, iterations=self.iterations, tol=self.tol)
        expert = scores.topk(self.k, dim=-1).indices
        weight = (probs if self.activation == "softmax" else logits.sigmoid()).gather(1, expert)
        return routing_of_choices(
            expert,
            weight,
            self.num_experts,
            mask=mask,
            capacity=self.capacity,
            training=self.training,
            losses={"router_z": router_z(logits, mask)},
            statistics=score_statistics(logits, probs, mask),
        )
