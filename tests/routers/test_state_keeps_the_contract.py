"""The contract suite on routers as training leaves them: matrices, biases and steps that are not at their start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moekit.routers import (
    AdaptiveCoefficient,
    DenseToSparseRouter,
    GroupLimit,
    HierarchicalRouter,
    LinearDecay,
    LossFreeRouter,
    NoisyTopKRouter,
    ReLURouter,
)
from moekit.routing import Capacity, Router
from moekit.testing import ROUTER_CHECKS

D, E = 8, 6


def trained(router: Router, step: int = 0) -> Router:
    """Random matrices and bias, after `step` steps."""
    router.on_step_end(step)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        for buffer in router.buffers():
            if buffer.is_floating_point():
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return router


ROUTERS: dict[str, Callable[[], Router]] = {
    "noisy top-k": lambda: trained(NoisyTopKRouter(D, E, 2)),
    "noisy top-k, capacity": lambda: trained(
        NoisyTopKRouter(D, E, 3, capacity=Capacity(train=0.6, eval=0.8, minimum=1))
    ),
    "hierarchical": lambda: trained(HierarchicalRouter(D, 3, 4)),
    "dense to sparse, half-way": lambda: trained(
        DenseToSparseRouter(D, E, LinearDecay(2.0, 0.3, 10), hard_from=10, threshold=0.1), step=5
    ),
    "dense to sparse, hard": lambda: trained(
        DenseToSparseRouter(D, E, LinearDecay(2.0, 0.3, 10), hard_from=10), step=10
    ),
    "loss-free": lambda: trained(LossFreeRouter(D, E, 2, renormalise=True, groups=GroupLimit(3, 2))),
    "loss-free, softmax, capacity": lambda: trained(
        LossFreeRouter(D, E, 2, score="softmax", capacity=Capacity(train=0.6))
    ),
    "relu": lambda: trained(ReLURouter(D, E, 2, coefficient=AdaptiveCoefficient(0.5, start=1.0))),
}


CHECKS = [check for check in ROUTER_CHECKS if check.__name__ != "check_meta_device"]  # that one wants a fresh start


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ROUTERS)
def test_contract(name: str, check: Callable[[Callable[[], Router]], None]) -> None:
    check(ROUTERS[name])
