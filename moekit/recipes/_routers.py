"""Routers that send a token to one expert without a limit, which recipes compare in the place of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from moekit.routers import CosineRouter, LossFreeRouter, SampledSoftmax, TopKRouter, base_layers
from moekit.routing import Router

Learned = Literal["switch", "sampled", "cosine", "base", "loss_free"]
LEARNED: Mapping[Learned, Callable[[int, int], Router]] = {
    # Switch's softmax without jitter, so that runs of a pair draw the same random numbers
    "switch": lambda dim, num_experts: TopKRouter(dim, num_experts),
    "sampled": lambda dim, num_experts: TopKRouter(dim, num_experts, exploration=SampledSoftmax()),
    "cosine": lambda dim, num_experts: CosineRouter(dim, num_experts),
    # The assignment of training weighs a token against later ones, as in its paper; evaluation does not.
    "base": lambda dim, num_experts: base_layers(dim, num_experts, allow_future=True),
    "loss_free": lambda dim, num_experts: LossFreeRouter(dim, num_experts, 1),
}
"""By name, for D and E."""
