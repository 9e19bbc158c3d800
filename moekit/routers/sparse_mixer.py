"""SparseMixer: experts are drawn from the scores near the best, with a gradient that knows of the draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moekit.routers.load_window import LoadWindow
from moekit.routers.queueing import batch_capacity, clear_padding, routing_of_choices, score_statistics
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routers.topk import Balance
from moekit.routing import Capacity, Compensation, Routing, RoutingContext

_MIDPOINT = 1 / 3  # of Heun's third-order method: where the gradient is taken in a share of the steps
_MIDPOINT_SHARE = 0.75  # a draw below this makes it the midpoint, unless the best expert was drawn


class SparseMixerRouter(ScoredRouter):
    """One expert after another, each drawn among those whose score is near the best that is left.

    Among experts that are not chosen yet, those are near whose score s lies within the tolerance of the best b:
    (b - s) / max(|s|, b) <= 2 tolerance. Training draws one of them by its softmax p over the near ones (Gumbel's
    method), evaluation takes the best. The weight is p of the chosen; in training it counts a third of that in three
    quarters of the draws that were not the best, while the gradient stays that of p: Heun's third-order estimate of the
    gradient through the draw. Weights of several choices are not scaled to sum to 1.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        k: choices per token.
        tolerance: half the distance from the best, as a share of the score, within which experts are near; 0.01 in the
            released model, whose code calls it a jitter.
        balance: how the load-balancing loss counts.
        capacity: slots per expert and who is served first; dropless by default.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Returns in `Routing.losses` ``load_balance`` of the softmax over all scores; in `Routing.statistics` ``entropy`` and
    ``logsumexp`` of the same.

    Raises:
        ValueError: if `k` is not in 1..E, `tolerance` is negative, or `capacity` is a `SequenceCapacity`.

    Source: arXiv:2409.12136 section 2.2 (GRIN, k = 2). Differs: any k.
    """

    shown = ("dim", "num_experts", "k", "tolerance")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        scorer: ExpertScorer | None = None,
        tolerance: float = 0.01,
        balance: Balance | None = None,
        capacity: Capacity | None = None,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must be between 1 and num_experts: got k={k} and num_experts={num_experts}.")
        if not tolerance >= 0:
            raise ValueError(f"SparseMixerRouter's tolerance must not be negative: got {tolerance}.")
        self.k, self.tolerance = k, tolerance
        self.balance = balance or Balance(count="all")
        self.capacity = batch_capacity(capacity, "SparseMixerRouter")
        self.allow_future, self.looks_ahead = allow_future, self.capacity.looks_ahead
        self.observes = self.balance.scope == "global"
        self._window = LoadWindow(num_experts)

    def observe(self, routing: Routing) -> None:
        """Count load for the balance loss of the micro-batches that follow in this step; see `Router.observe`."""
        self.balance.observe(routing, self._window)

    @property
    def moves(self) -> bool:
        """See `Router.moves`."""
        return self.observes

    def on_step_end(self, step: int) -> None:  # noqa: D102
        self._window.clear()

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: later choices are weighed among what earlier ones left."""
        return Compensation(obstacle="SparseMixerRouter weighs each choice among those that are left")

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        logits = self.logits(x, context)
        left, chosen, weights = logits, [], []
        for _ in range(self.k):
            expert, weight = self._draw(logits, left)
            left = left.scatter(-1, expert, float("-inf"))
            chosen.append(expert)
            weights.append(weight)
        routing = routing_of_choices(
            torch.cat(chosen, dim=-1),
            torch.cat(weights, dim=-1),
            self.num_experts,
            mask=context.mask,
            capacity=self.capacity,
            training=self.training,
        )
        probs = logits.softmax(-1)
        after = self.balance.when == "after_drop"
        counted = (routing.kept if after else routing.queued).view(self.k, -1).t()
        loss = self.balance.loss(
            probs,
            torch.cat(chosen, dim=-1),
            counted,
            context,
            self._window,
            training=self.training,
            group_size=self.capacity.group_size,
        )
        statistics = score_statistics(logits, probs.detach(), context.mask)
        return replace(routing, losses={"load_balance": loss}, statistics=statistics)

    def _draw(self, logits: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Int64[T, 1] and Float32[T, 1]: one of the experts that are left, the others being -inf, and its weight."""
        with torch.no_grad():
            best, first = left.max(dim=-1, keepdim=True)
            far = (best - left) / logits.abs().clamp(min=best) > 2 * self.tolerance
        near = left.masked_fill(far, float("-inf"))
        probs = near.softmax(-1)
        if not self.training:
            return first, probs.gather(-1, first)
        expert = (near.detach() - torch.empty_like(near).exponential_().log()).argmax(-1, keepdim=True)
        weight = probs.gather(-1, expert)
        likeliest = expert == probs.argmax(-1, keepdim=True)
        whole = likeliest | (torch.rand_like(weight) > _MIDPOINT_SHARE)
        return expert, weight - (weight * ~whole * (1 - _MIDPOINT)).detach()
