"""Noisy top-k gate: scores with learned noise, and a softmax after the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.importance import importance_loss, load_loss
from moekit.functional.means import masked_mean
from moekit.functional.precision import float32_linear
from moekit.routers.queueing import batch_capacity, clear_padding, mask_choices, routing_of_choices, score_statistics
from moekit.routing import Capacity, Compensation, Router, Routing, RoutingContext


class NoisyTopKRouter(Router):
    """Top-k of noisy scores, softmax over the k that are left.

    H(x) = x W_g + N(0, 1) * softplus(x W_noise); the k largest are the choices; weights = softmax(H) over those k, so
    they sum to 1. The noise is learned, and balances the start: both matrices begin at zero.

    Args:
        dim: D.
        num_experts: E.
        k: choices per token, at least 2: the softmax over one survivor is the constant 1, which gives the task no way
            to teach the router.
        capacity: slots per expert and who is served first; dropless by default, as in the paper.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Returns in `Routing.losses`: ``importance`` (`moekit.functional.importance_loss`) and ``load``
    (`moekit.functional.load_loss`); in evaluation, where there is no noise, ``load`` is the variation of the plain
    counts and has no gradient. In `Routing.statistics`: ``entropy`` and ``logsumexp`` of the scores without noise, and
    ``noise``, its mean scale over real tokens.

    Raises:
        ValueError: if `k` is not in 2..E, or `capacity` is a `SequenceCapacity`.

    Source: arXiv:1701.06538 section 2.1 and 4, eq. 3-11.
    Differs: no noise in evaluation, as in the authors' code. Both losses count before capacity drops anything.
    """

    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "noise_weight": 0}

    shown = ("dim", "num_experts", "k", "capacity")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 4,
        *,
        capacity: Capacity | None = None,
        allow_future: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= k <= num_experts:
            raise ValueError(
                f"NoisyTopKRouter needs k between 2 and num_experts: got k={k} and num_experts={num_experts}. Its "
                "softmax runs over the chosen experts alone, so with one choice the weight is the constant 1; for "
                "k=1 use moekit.routers.switch."
            )
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.capacity = batch_capacity(capacity, "NoisyTopKRouter")
        self.allow_future = allow_future
        self.looks_ahead = self.capacity.looks_ahead
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both matrices to zero: the start is pure noise (arXiv:1701.06538 appendix A)."""
        self.weight.zero_()
        self.noise_weight.zero_()

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: weights are a softmax over the chosen."""
        return Compensation.of_best(self.k, copies, divided=True)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        clean = float32_linear(x, self.weight)
        scale = F.softplus(float32_linear(x, self.noise_weight))
        noisy = clean + torch.randn_like(clean) * scale if self.training else clean
        top, expert = noisy.topk(self.k, dim=-1)
        weight = top.softmax(-1)
        requested = mask_choices(torch.ones_like(expert, dtype=torch.bool), context.mask)
        if self.training:
            balance = load_loss(clean, noisy, scale, self.k, context.mask)
        else:
            balance = importance_loss(requested.to(weight.dtype), expert, self.num_experts)  # every assignment counts 1
        losses = {"importance": importance_loss(weight, expert, self.num_experts, requested), "load": balance}
        statistics = score_statistics(clean, clean.softmax(-1), context.mask)
        statistics["noise"] = masked_mean(scale.detach().mean(-1), context.mask)
        return routing_of_choices(
            expert,
            weight,
            self.num_experts,
            mask=context.mask,
            capacity=self.capacity,
            training=self.training,
            losses=losses,
            statistics=statistics,
        )


def noisy_topk(
    dim: int,
    num_experts: int,
    *,
    k: int = 4,
    capacity_factor: float | None = None,
    eval_capacity_factor: float | None = None,
) -> NoisyTopKRouter:
    """Sparsely-gated Mixture of Experts: four experts per token by noisy scores, dropless.

    Weigh its losses with ``AuxLosses(importance=0.1, load=0.1)``.
    A capacity factor of None is dropless, as in the paper.

    Source: arXiv:1701.06538; ``k=4`` of its flat models, and the weights of the losses from its appendix C.
    """
    capacity = Capacity(train=capacity_factor, eval=eval_capacity_factor)
    return NoisyTopKRouter(dim, num_experts, k, capacity=capacity)
