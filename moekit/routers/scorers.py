"""How a router scores experts for tokens: the part that turns hidden states, or the context, into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekit.functional.init import truncated_normal_
from moekit.functional.precision import float32_linear
from moekit.routing import Router, RoutingContext

_INIT_SCALE = 0.1


class ExpertScorer(ABC):
    """Scores experts for tokens.

    Subclass it for scores of your own. A scorer holds settings alone. Its parameters are the router's own, under the
    names of `shapes`, so one scorer may be given to several routers.

    Attributes:
        expert_dims: the dimension that counts experts, by name of a parameter; see `moekit.routing.Router`.
        looks_up: whether parameters are tables, of which a token's scores are read, rather than matrices.
    """

    expert_dims: ClassVar[Mapping[str, int]]
    looks_up: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name, for hidden states of width `dim` and `num_experts` experts."""

    @abstractmethod
    def draw_(self, parameters: Mapping[str, Tensor]) -> None:
        """Draw first values of all parameters in place; do nothing to those on the meta device."""

    @abstractmethod
    def __call__(self, x: Tensor, context: RoutingContext, parameters: Mapping[str, Tensor]) -> Tensor:
        """Score.

        Args:
            x: Float[T, D]; zeros at padding, and perturbed where the router explores in training.
            context: fields ``[T]``.
            parameters: those of the router, by name.

        Returns:
            Float32[T, E] logits.
        """


@dataclass(frozen=True)
class LinearScorer(ExpertScorer):
    """logits = x W_r, in float32 ("selective precision").

    Attributes:
        init_scale: variance scale of the truncated normal from which W_r starts; its std is sqrt(init_scale / D).

    Source: arXiv:2101.03961 section 2.4 and table 3 (scale 0.1).
    """

    init_scale: float = _INIT_SCALE
    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0}

    def shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {"weight": (num_experts, dim)}

    def draw_(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: D102
        truncated_normal_(parameters["weight"], parameters["weight"].shape[1], self.init_scale)

    def __call__(self, x: Tensor, context: RoutingContext, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return float32_linear(x, parameters["weight"])


@dataclass(frozen=True)
class BiasedLinearScorer(LinearScorer):
    """logits = x W_r + b, in float32; b begins at 0.

    Source: the released code of GPT-OSS.
    """

    expert_dims: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

    def shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {**super().shapes(dim, num_experts), "bias": (num_experts,)}

    def draw_(self, parameters: Mapping[str, Tensor]) -> None:  # noqa: D102
        super().draw_(parameters)
        if not parameters["bias"].is_meta:
            parameters["bias"].zero_()

    def __call__(self, x: Tensor, context: RoutingContext, parameters: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        logits = super().__call__(x, context, parameters)
        return logits + parameters["bias"].to(logits.dtype)


class ScoredRouter(Router):
    """A router that begins with logits of an `ExpertScorer`.

    Args:
        dim: D.
        num_experts: E.
        scorer: how experts are scored; None = `LinearScorer`, logits = x W_r.
        init_scale: variance scale of the linear scorer's first weights.

    Raises:
        ValueError: if `dim` or `num_experts` is not positive, or `init_scale` is given beside a scorer, which has its
            own.
    """

    def __init__(
        self, dim: int, num_experts: int, scorer: ExpertScorer | None = None, *, init_scale: float = _INIT_SCALE
    ) -> None:
        super().__init__()
        if dim < 1 or num_experts < 1:
            raise ValueError(f"dim and num_experts must be at least 1: got dim={dim} and num_experts={num_experts}.")
        if scorer is not None and init_scale != _INIT_SCALE:
            raise ValueError(
                f"init_scale is of the linear scorer: got init_scale={init_scale} and {scorer}. Give the scorer its "
                "own first values, for example LinearScorer(init_scale=1.0)."
            )
        self.dim, self.num_experts = dim, num_experts
        self.scorer = scorer or LinearScorer(init_scale)
        self._scored = self.scorer.shapes(dim, num_experts)
        for name, shape in self._scored.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        ScoredRouter.reset_parameters(self)  # a subclass draws its own parameters once it has them

    @property
    def expert_dims(self) -> Mapping[str, int] | None:  # type: ignore[override]  # noqa: D102
        return self.scorer.expert_dims

    @property
    def multiplications_per_token(self) -> int:  # noqa: D102
        tables = self._score_parameters().values() if self.scorer.looks_up else ()
        return super().multiplications_per_token - sum(table.numel() for table in tables)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scorer's parameters anew."""
        self.scorer.draw_(self._score_parameters())

    def logits(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Float32[T, E] scores of ``x`` Float[T, D], which training may have perturbed."""
        return self.scorer(x, context or RoutingContext(), self._score_parameters())

    def _score_parameters(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self._scored}
        adapter: Any = self._modules.get("adapter")  # see `moekit.surgery.adapters`
        if adapter is not None:
            found["weight"] = found["weight"] + adapter.product().transpose(0, 1)
        return found
