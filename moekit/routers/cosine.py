"""Cosine scores (X-MoE): cosines in a small space, divided by a learned temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.init import truncated_normal_
from moekit.functional.precision import float32_linear, without_autocast
from moekit.routers.scorers import ExpertScorer
from moekit.routers.topk import TopKRouter
from moekit.routing import RoutingContext

_COLDEST = 0.01


@dataclass(frozen=True)
class CosineScorer(ExpertScorer):
    """logits = cos(W x, e_i) / temperature, between a projected token and an embedding of each expert.

    Neither the norm of a token nor that of an expert's embedding has a say. Tokens are compared in few dimensions,
    which keeps the experts' embeddings from pulling all representations towards them.

    Attributes:
        projected_dim: width of the space of comparison; None = E / 2 as in the paper, at least 8 (ours).
        temperature: initial value; learned as its logarithm, never below 0.01. 0.5 as in Tutel's cosine gate.

    Raises:
        ValueError: if `projected_dim` is less than 1, or `temperature` below its floor.

    Source: arXiv:2204.09179 section 3 (expert embeddings of dimension E / 2, orthogonal with gain 0.32 in the authors'
        code); Tutel's cosine gate (temperature as a learned logarithm with a floor of 0.01). Differs: the projection
        has no bias and starts as a truncated normal of variance 1 / D (ours).
    """

    projected_dim: int | None = None
    temperature: float = 0.5
    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __post_init__(self) -> None:
        if self.projected_dim is not None and self.projected_dim < 1:
            raise ValueError(f"projected_dim must be at least 1, or None: got {self.projected_dim}.")
        if self.temperature < _COLDEST:
            raise ValueError(f"temperature must be at least {_COLDEST}, its floor in training: got {self.temperature}.")

    def shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        width = self.projected_dim or max(num_experts // 2, 8)
        return {"weight": (num_experts, width), "projection": (width, dim), "log_temperature": ()}

    def draw_(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: D102
        if not parameters["weight"].is_meta:
            truncated_normal_(parameters["projection"], parameters["projection"].shape[1], 1.0)
            nn.init.orthogonal_(parameters["weight"], gain=0.32)
            parameters["log_temperature"].fill_(math.log(self.temperature))

    def __call__(self, x: Tensor, context: RoutingContext, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        low = float32_linear(x, parameters["projection"])
        with without_autocast(x.device):
            cosine = F.normalize(low, dim=-1) @ F.normalize(parameters["weight"].to(low.dtype), dim=-1).t()
        return cosine / temperature_of(parameters["log_temperature"])


def temperature_of(logarithm: Tensor) -> Tensor:
    """Float32 scalar: the temperature in force where its learned ``logarithm`` is this."""
    return logarithm.to(torch.promote_types(logarithm.dtype, torch.float32)).exp().clamp_min(_COLDEST)


class CosineRouter(TopKRouter):
    """`TopKRouter` with a `CosineScorer`, whose arguments it takes beside its own.

    Raises:
        ValueError: see `CosineScorer` and `TopKRouter`.

    Source: arXiv:2204.09179.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        projected_dim: int | None = None,
        temperature: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, k, scorer=CosineScorer(projected_dim, temperature), **options)
