"""Expert choice: every expert takes the C tokens that score it highest; no token is told to wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.functional.losses import router_z
from moekit.routers.queueing import clear_padding, score_statistics
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routing import Capacity, Compensation, Routing, RoutingContext


class ExpertChoiceRouter(ScoredRouter):
    """Each expert takes its top C tokens; a token may get many experts, or none.

    S = softmax(logits) over experts; G, I = top-C of each column of S; the weight is G. C = capacity_factor * T / E,
    so that a token gets capacity_factor experts on average. Load is exactly equal, and there is no balance loss.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        capacity_factor: average number of experts per token in training; 2 in the paper's main results.
        eval_capacity_factor: the same in evaluation; None = as in training. There is no dropless expert choice.
        allow_future: accept this router in a causal decoder, although an expert compares a token with later ones.

    The assignments are expert-major, each expert's in descending order of weight. Like every capacity, C counts the
    padding of the batch; where fewer than C tokens are real, slots stay empty.

    Raises:
        ValueError: if a capacity factor is None or not positive.

    Returns in `Routing.losses`: ``router_z``; in `Routing.statistics`: ``entropy`` and ``logsumexp``.

    Source: arXiv:2202.09368 section 3.2. Differs: the variant that bounds the experts of a token (section 3.3, a
        linear program) is not built.
    """

    shown = ("dim", "num_experts", "capacity")
    looks_ahead = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        scorer: ExpertScorer | None = None,
        capacity_factor: float = 2.0,
        eval_capacity_factor: float | None = None,
        init_scale: float = 0.1,
        allow_future: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if capacity_factor is None:
            raise ValueError(
                "ExpertChoiceRouter needs a capacity_factor: experts take a number of tokens, and there is no dropless "
                "form. Give the average number of experts per token, for example 2.0."
            )
        evaluation = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.capacity = Capacity(train=capacity_factor, eval=evaluation, minimum=1)
        self.allow_future = allow_future

    @property
    def choices_per_token(self) -> float:  # noqa: D102
        assert self.capacity.train is not None
        return self.capacity.train

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: every copy must take as many tokens as one did."""
        return Compensation(choices=copies)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        mask = context.mask
        t, e = x.shape[0], self.num_experts
        logits = self.logits(clear_padding(x, mask), context)
        probs = logits.softmax(-1)
        slots = self.capacity.slots(t, e, 1, training=self.training)
        assert slots is not None
        # Padding comes last, below every probability: the real tokens of an expert then hold places 0 to n-1.
        wish = probs.detach() if mask is None else probs.detach().masked_fill(~mask[:, None], -1.0)
        token = wish.t().topk(slots, dim=-1).indices.reshape(-1)
        expert = torch.arange(e, device=x.device).repeat_interleave(slots)
        kept = torch.ones_like(token, dtype=torch.bool) if mask is None else mask[token]
        place = torch.arange(slots, device=x.device).repeat(e)
        return Routing(
            token=token,
            expert=expert,
            weight=probs[token, expert],
            position=torch.where(kept, place, -1),
            kept=kept,
            losses={"router_z": router_z(logits, mask)},
            statistics=score_statistics(logits, probs, mask),
            num_tokens=t,
            num_experts=e,
            capacity=slots,
            all_kept=mask is None,
        )
