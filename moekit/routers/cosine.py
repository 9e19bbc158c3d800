"""Cosine router (X-MoE): scores are cosines in a small space, divided by a learned temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.drawing import truncated_normal_
from moekit.functional.precision import wide_linear, without_autocast
from moekit.routers.choices import LaterChoices
from moekit.routers.exploration import Exploration
from moekit.routers.topk import Balance, Renormalise, TopKRouter
from moekit.routing import Capacity

_COLDEST = 0.01


class CosineRouter(TopKRouter):
    """Top-k token choice by the cosine between a projected token and an embedding of each expert.

    logits = cos(W x, e_i) / temperature; everything after the logits is `TopKRouter`'s. Neither the norm of a token nor
    that of an expert's embedding has a say, and tokens are compared in few dimensions, which keeps the experts'
    embeddings from pulling all representations towards them.

    Args:
        dim: D.
        num_experts: E.
        k: choices per token.
        projected_dim: width of the space of comparison; None = E / 2 as in the paper, at least 8 (ours).
        temperature: initial value; learned as its logarithm, never below 0.01. 0.5 as in Tutel's cosine gate.
        capacity: see `TopKRouter`, as the arguments below.
        renormalise: whether the k weights of a token sum to 1.
        later_choices: how the choices after the first are picked and sent.
        exploration: noise in training.
        balance: how the load-balancing loss counts.
        allow_future: accept priorities that look at later tokens in a causal decoder.

    Returns the losses and statistics of `TopKRouter`.

    Source: arXiv:2204.09179 section 3 (expert embeddings of dimension E / 2, orthogonal with gain 0.32 in the authors'
        code); Tutel's cosine gate (temperature as a learned logarithm with a floor of 0.01). Differs: the projection
        has no bias and starts as a truncated normal of variance 1 / D (ours).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        projected_dim: int | None = None,
        temperature: float = 0.5,
        capacity: Capacity | None = None,
        renormalise: Renormalise = "none",
        later_choices: LaterChoices | None = None,
        exploration: Exploration | None = None,
        balance: Balance | None = None,
        allow_future: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            k,
            capacity=capacity,
            renormalise=renormalise,
            later_choices=later_choices,
            exploration=exploration,
            balance=balance,
            allow_future=allow_future,
        )
        if projected_dim is not None and projected_dim < 1:
            raise ValueError(f"projected_dim must be at least 1, or None: got {projected_dim}.")
        if temperature < _COLDEST:
            raise ValueError(f"temperature must be at least {_COLDEST}, its floor in training: got {temperature}.")
        self.projected_dim = projected_dim or max(num_experts // 2, 8)
        self.initial_temperature = temperature
        self.projection = nn.Parameter(torch.empty(self.projected_dim, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, self.projected_dim))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw projection and embeddings anew; the temperature is the initial one."""
        if self.weight.device.type != "meta":
            truncated_normal_(self.projection, self.projection.shape[1], 1.0)
            nn.init.orthogonal_(self.weight, gain=0.32)
            self.log_temperature.fill_(math.log(self.initial_temperature))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, projected_dim={self.projected_dim}"

    @property
    def temperature(self) -> Tensor:
        """Float32 scalar: the temperature in force."""
        wide = torch.promote_types(self.log_temperature.dtype, torch.float32)
        return self.log_temperature.to(wide).exp().clamp_min(_COLDEST)

    def logits(self, x: Tensor) -> Tensor:
        """Float32[T, E] scores of ``x`` Float[T, D], which training may have perturbed."""
        low = wide_linear(x, self.projection)
        with without_autocast(x.device):
            cosine = F.normalize(low, dim=-1) @ F.normalize(self.weight.to(low.dtype), dim=-1).t()
        return cosine / self.temperature
