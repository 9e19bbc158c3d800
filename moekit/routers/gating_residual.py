"""Scores of the sparse layer before enter a router's: a token's path through the layers becomes steadier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.functional.precision import float32_linear
from moekit.routers.queueing import clear_padding
from moekit.routing import RoutingContext


class GatingResidual(nn.Module):
    """What a router adds to its logits: a linear map of the logits of the sparse layer before.

    logits_j = x W_r + W_g logits_{j-1}; the first sparse layer has nothing to add. Given to `TopKRouter` as
    ``residual=``, in every sparse layer of a stack: the router then returns its logits, sum included, in
    `Routing.logits`, and `moekit.transformer.Stack` hands them to the next sparse layer in
    `RoutingContext.previous_logits`. Nothing is stored in between. Encoder and decoder begin anew.

    Args:
        num_experts: E of this layer.
        previous: E of the sparse layer before; None = this is the first.

    Raises:
        ValueError: if a number is not positive; in forward, if the logits of the layer before are missing or not
            wanted, or are of another number of experts.

    Source: arXiv:2410.07348 section 3.2; the start (uniform within 1 / sqrt(E')) as in its released code.
    """

    def __init__(self, num_experts: int, previous: int | None) -> None:
        super().__init__()
        if num_experts < 1 or (previous is not None and previous < 1):
            raise ValueError(f"GatingResidual needs numbers of experts: got {num_experts} and previous={previous}.")
        self.num_experts, self.previous = num_experts, previous
        self.weight = None if previous is None else nn.Parameter(torch.empty(num_experts, previous))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the map anew."""
        if self.weight is not None and self.previous is not None:
            bound = self.previous**-0.5
            self.weight.uniform_(-bound, bound)

    def extra_repr(self) -> str:  # noqa: D102
        return f"num_experts={self.num_experts}, previous={self.previous}"

    def forward(self, context: RoutingContext) -> Tensor | float:
        """Float32[T, E] to add to the logits; 0 in the first layer."""
        before = context.previous_logits
        found = None if before is None else before.shape[-1]
        if found != self.previous:
            raise ValueError(
                f"GatingResidual was built for a layer before with {self.previous} experts (None = there is none): "
                f"RoutingContext.previous_logits is of {found}. Give every router of the stack a residual, the first "
                "one with previous=None, and hand Routing.logits on."
            )
        if self.weight is None or before is None:
            return 0.0
        return float32_linear(clear_padding(before, context.mask), self.weight)
