"""ReLU routing: no top-k; a penalty that steers itself makes the scores sparse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moekit.component import Component
from moekit.functional.means import masked_mean
from moekit.routers.load_window import LoadWindow
from moekit.routers.queueing import clear_padding, routing_of_pairs
from moekit.routers.scorers import ExpertScorer, ScoredRouter
from moekit.routing import Compensation, Routing, RoutingContext


class AdaptiveCoefficient(Component):
    """A coefficient that grows while the routers are denser than wanted and shrinks while they are sparser.

    coefficient = start * factor^n; after each optimizer step n moves by sign(target - sparsity), where sparsity is the
    share of (token, expert) pairs without an assignment, over all processes, micro-batches and the routers that share
    this object. One number n is all its state: whole, so that no precision loses it.

    Args:
        target: wanted sparsity, 1 - k / E.
        start: coefficient at step 0.
        factor: the number that a step multiplies or divides the coefficient by.

    Raises:
        ValueError: if `target` is not in [0, 1), `start` is not positive or `factor` not above 1.

    Source: arXiv:2412.14711 section 3.3 (1e-8 and 1.2).
    """

    exponent: Tensor

    def __init__(self, target: float, *, start: float = 1e-8, factor: float = 1.2) -> None:
        super().__init__()
        if not 0 <= target < 1:
            raise ValueError(f"target is a sparsity in [0, 1): got {target}. For k of E experts it is 1 - k / E.")
        if not (start > 0 and factor > 1):
            raise ValueError(f"AdaptiveCoefficient needs start > 0 and factor > 1: got {start} and {factor}.")
        self.target, self.start, self.factor = target, start, factor
        self._window = LoadWindow(2)  # pairs with an assignment, all pairs
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Begin at `start`."""
        self.exponent.zero_()

    def extra_repr(self) -> str:  # noqa: D102
        return f"target={self.target}, start={self.start}, factor={self.factor}"

    def forward(self) -> Tensor:
        """Float32 scalar: the coefficient now."""
        return self.start * self.factor ** self.exponent.to(torch.float32)

    def observe(self, active: Tensor, pairs: Tensor) -> None:
        """Count ``active`` assignments of ``pairs`` possible ones, Int64 scalars."""
        self._window.add(torch.stack([active, pairs]))

    def on_step_end(self, step: int) -> None:
        """Move by what was observed, in all processes alike; begin a new count."""
        active, pairs = self._window.summed(self.exponent.device).to(torch.float64).unbind()
        # The wanted and the found number of empty pairs; both are 0 where nothing was observed.
        self.exponent += torch.sign(self.target * pairs - (pairs - active)).to(torch.int64)
        self._window.clear()


class ReLURouter(ScoredRouter):
    """Every expert with a positive score, weighted by it: fully differentiable, the number of experts free.

    weight = relu(logits); an expert runs where it is above 0. The returned loss steers how many: a load-weighted L1 of
    the weights, times a coefficient that adapts until k of E experts run on average.

    `dim`, `num_experts`, `scorer` and `init_scale` are those of `ScoredRouter`.

    Args:
        k: experts wanted per token on average; need not be whole.
        coefficient: the adaptive coefficient; None = one of its own. Give several routers the same object to steer
            their average sparsity, as the paper does for all layers.

    Returns in `Routing.losses`: ``sparsity``, the mean over real tokens of sum_e f_e relu(x W_r)_e, with f_e = E / k *
    the share of tokens that run expert e (no gradient), times the coefficient. It adapts already: weigh it with
    ``AuxLosses(sparsity=1.0, layers="mean")``. In `Routing.statistics`: ``active_experts`` (mean per real token),
    ``coefficient``, ``real_tokens``. Dropless; a token that no expert takes gets zeros.

    Raises:
        ValueError: if `k` is not in (0, E].

    Source: arXiv:2412.14711 eq. 4-9.
    Differs: by default each router steers its own sparsity with its own coefficient.
    """

    shown = ("dim", "num_experts", "k")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: float,
        *,
        scorer: ExpertScorer | None = None,
        coefficient: AdaptiveCoefficient | None = None,
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(dim, num_experts, scorer, init_scale=init_scale)
        if not 0 < k <= num_experts:
            raise ValueError(f"k must be above 0 and at most num_experts: got k={k} and num_experts={num_experts}.")
        self.k = k
        self.observes = True
        self.coefficient = coefficient or AdaptiveCoefficient(1 - k / num_experts)

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: all copies run, each with the whole weight."""
        return Compensation(choices=copies, scale=1 / copies)

    def observe(self, routing: Routing) -> None:
        """Tell the coefficient how many assignments there were; see `Router.observe`."""
        pairs = routing.statistics["real_tokens"].to(torch.int64) * self.num_experts
        self.coefficient.observe(routing.queued.sum(), pairs)

    def on_step_end(self, step: int) -> None:
        """Move the coefficient. A second call before anything new was observed, by a router that shares it, is idle."""
        if not self.coefficient.frozen:
            self.coefficient.on_step_end(step)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        x = clear_padding(x, context.mask)
        score = self.logits(x, context).relu()
        mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device) if context.mask is None else context.mask
        active = (score > 0) & mask[:, None]
        share = masked_mean(active.to(score.dtype), mask)
        penalty = (masked_mean(score.masked_fill(~active, 0.0), mask) * share).sum() * (self.num_experts / self.k)
        coefficient = self.coefficient().to(score.dtype)
        statistics = {
            "active_experts": masked_mean(active.sum(1).to(score.dtype), mask),
            "coefficient": coefficient,
            "real_tokens": mask.sum().to(score.dtype),
        }
        return routing_of_pairs(active, score, {"sparsity": coefficient * penalty}, statistics)


def remoe(dim: int, num_experts: int, *, k: float = 1.0) -> ReLURouter:
    """ReMoE: ReLU routing with an adaptive load-weighted L1 penalty.

    Weigh its loss with ``AuxLosses(sparsity=1.0, layers="mean")``.
    The k experts that are wanted per token on average are 1 in the paper's main comparison.

    Source: arXiv:2412.14711.
    """
    return ReLURouter(dim, num_experts, k)
