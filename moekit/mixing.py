"""What happens to the outputs of experts: masked at random, or mixed with a branch that every token takes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moekit.component import Component
from moekit.functional.means import masked_mean
from moekit.functional.precision import float32_linear
from moekit.routing import Deviation, Routing, RoutingContext, deviation_loss


class Mixed(NamedTuple):
    """Result of a `Mix`.

    Attributes:
        hidden: Float[T, D].
        losses: unweighted scalars by name; the layer adds them to its routing's.
        statistics: detached scalars by name, for logs; likewise.
        deviations: parts of losses that are one for all layers, by name; likewise.
    """

    hidden: Tensor
    losses: Mapping[str, Tensor] = {}
    statistics: Mapping[str, Tensor] = {}
    deviations: Mapping[str, Deviation] = {}


class Mix(Component, ABC):
    """Joins what the experts made of each token with what the shared branch made of it.

    Given to `moekit.MoELayer` as ``mix=``, beside ``shared=``. Without one the two are added.
    """

    @abstractmethod
    def forward(self, x: Tensor, routed: Tensor, shared: Tensor, context: RoutingContext | None = None) -> Mixed:
        """Join the branches.

        Args:
            x: Float[T, D], the layer's input.
            routed: Float[T, D], the experts' weighted sum; zeros for dropped tokens and padding.
            shared: Float[T, D], the shared branch.
            context: tells padding; fields ``[T]``.
        """


class _LinearGate(Mix):
    """A mix whose shares are a function of a linear score of the input."""

    def __init__(self, dim: int, scores: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(scores, dim))
        self.bias = nn.Parameter(torch.empty(scores))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scores' weights anew, uniformly within 1 / sqrt(D) as in `torch.nn.Linear`; the bias becomes 0."""
        self.weight.uniform_(-(self.dim**-0.5), self.dim**-0.5)
        self.bias.zero_()

    def _scores(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Float32[T, scores]; padding, which may hold NaN, is read as zeros."""
        if mask is not None:
            x = x.masked_fill(~mask[:, None], 0.0)
        return float32_linear(x, self.weight) + self.bias


class SoftmaxMix(_LinearGate):
    """y = c_1 routed + c_2 shared, (c_1, c_2) = softmax(W x + b): how DeepSpeed's code joins the residual branch.

    The paper of PR-MoE adds the two (``mix=None``). Padding gets half of its shared branch.

    Args:
        dim: D.

    Source: released code of arXiv:2201.05596 (``Linear(d, 2)``), departing from section 4.1 of the paper.
    Differs: shares are computed in float32, and the bias starts at 0.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2)

    def forward(  # noqa: D102
        self, x: Tensor, routed: Tensor, shared: Tensor, context: RoutingContext | None = None
    ) -> Mixed:
        mask = None if context is None else context.mask
        share = self._scores(x, mask).softmax(-1)
        if mask is not None:
            share = share.masked_fill(~mask[:, None], 0.5)  # so that no NaN of padding reaches the gradient
        hidden = share[:, :1] * routed + share[:, 1:] * shared
        mean = masked_mean(share[:, 0].detach(), mask)
        return Mixed(hidden.to(routed.dtype), statistics={"routed_share": mean})


class ConditionalMix(_LinearGate):
    """Conditional MoE routing (CMR): y = g routed + (1 - g) shared with g = sigmoid(w x + b), within a budget.

    Returns the loss ``conditional_budget`` = |mean of g - budget|, the mean over the real tokens of all layers, which
    keeps a share of the tokens on the shared branch: a layer may use its experts more if another uses its own less.
    Padding takes the shared branch alone.

    Args:
        dim: D.
        budget: the mean that g should have; 0.8 in arXiv:2207.04672.
        gate_dropout: probability of g = 0 in training, so that the shared branch learns to do without the experts.
        scope: what the budget is of: "model" = the mean over the tokens of all layers that `AuxLosses` is called with,
            returned as a `Deviation`; "layer" = each layer keeps it, and the loss is among the layer's own.

    Raises:
        ValueError: if `budget` is not in [0, 1], `gate_dropout` not in [0, 1), or `scope` neither of the two.

    Source: arXiv:2207.04672 section 6.2.2 (conditional MoE routing); the sum over all layers before the absolute value:
        fairseq's branch nllb.
    Differs: gate dropout sets g to 0 for whole tokens and leaves the others as they are; fairseq's divides them by
        1 - p, so that g may exceed 1. The budget counts gates before dropout, and tokens of this process (fairseq's
        default; its option ``moe_cmr_xgpu`` counts those of all).
    """

    def __init__(
        self,
        dim: int,
        *,
        budget: float = 0.8,
        gate_dropout: float = 0.0,
        scope: Literal["model", "layer"] = "model",
    ) -> None:
        super().__init__(dim, 1)
        if scope not in ("model", "layer"):
            raise ValueError(f'ConditionalMix.scope must be "model" or "layer": got {scope!r}.')
        self.scope = scope
        if not 0 <= budget <= 1:
            raise ValueError(f"ConditionalMix.budget must be in [0, 1]: got {budget}. The paper uses 0.8.")
        _check_probability("ConditionalMix.gate_dropout", gate_dropout)
        self.budget, self.gate_dropout = budget, gate_dropout

    def forward(  # noqa: D102
        self, x: Tensor, routed: Tensor, shared: Tensor, context: RoutingContext | None = None
    ) -> Mixed:
        mask = None if context is None else context.mask
        gate = self._scores(x, mask).sigmoid().squeeze(-1)
        if mask is not None:
            gate = gate.masked_fill(~mask, 0.0)
        mean = masked_mean(gate, mask)
        real = gate.new_full((), gate.numel()) if mask is None else mask.sum().to(gate.dtype)
        # gate is 0 in padding, which is not in the count.
        away = Deviation(gate.sum() - self.budget * real, real)
        if self.training and self.gate_dropout > 0:
            gate = gate * (torch.rand_like(gate) >= self.gate_dropout)
        gate = gate[:, None]
        hidden = (gate * routed + (1 - gate) * shared).to(routed.dtype)
        statistics = {"routed_share": mean.detach()}
        if self.scope == "model":
            return Mixed(hidden, statistics=statistics, deviations={"conditional_budget": away})
        return Mixed(hidden, {"conditional_budget": deviation_loss([away])}, statistics)


class ExpertOutputMasking(Component):
    """Expert output masking (EOM): in training each expert's output for a token is zero with a probability.

    The vector of one token from one expert is masked as a whole, and what stays is not scaled up; in evaluation every
    output is multiplied by 1 - p instead. Given to `moekit.MoELayer` as ``output_masking=``. Since an output is
    multiplied by its assignment's weight anyway, it is the weights that are masked, and the routing that the layer
    returns has those; losses and statistics of the router are as without masking.

    Args:
        probability: p; 0.2 in arXiv:2207.04672 (0.1 in an ablation).

    Raises:
        ValueError: if `probability` is not in [0, 1).

    Source: arXiv:2207.04672 section 6.2.2, and fairseq's branch nllb. Differs: Hugging Face's NllbMoe drops single
        elements, scales the others up, and multiplies by 1 - p in evaluation as well.
    """

    def __init__(self, probability: float = 0.2) -> None:
        super().__init__()
        _check_probability("ExpertOutputMasking.probability", probability)
        self.probability = probability

    def forward(self, routing: Routing) -> Routing:
        """The same routing with masked (training) or smaller (evaluation) weights."""
        if self.training:
            weight = routing.weight * (torch.rand_like(routing.weight) >= self.probability)
        else:
            weight = routing.weight * (1 - self.probability)
        return dataclasses.replace(routing, weight=weight)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1): got {value}.")
