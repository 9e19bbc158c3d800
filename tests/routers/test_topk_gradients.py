"""float64 gradcheck of TopKRouter: weights under each renormalisation, and both losses, drops and padding included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moekit.routers import Balance, TopKRouter
from moekit.routing import Capacity, RoutingContext
from moekit.testing import skewed_tokens

T, D, E = 8, 4, 5


@pytest.mark.parametrize(
    ("renormalise", "scope", "k"),
    [("none", "global", 1), *itertools.product(["none", "before_drop", "after_drop"], ["batch", "sequence"], [2])],
)
def test_gradcheck(renormalise: str, scope: str, k: int) -> None:
    router = TopKRouter(
        D,
        E,
        k,
        capacity=Capacity(train=0.8, minimum=1),
        renormalise=renormalise,  # type: ignore[arg-type]
        balance=Balance(count="all", when="after_drop", scope=scope),  # type: ignore[arg-type]
    )
    router.double().train()
    context = RoutingContext(mask=torch.arange(T) != 5, sequence=torch.arange(T) // 3)
    dropped = []

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing = functional_call(router, {"weight": weight}, (x, context))
        dropped.append(bool((routing.queued & ~routing.kept).any()))
        return routing.weight * routing.kept, *routing.losses.values()

    x = skewed_tokens(T, D, dtype=torch.float64, seed=2).requires_grad_()
    weight = 0.5 * torch.randn(E, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(outputs, (x, weight.requires_grad_()))
    assert all(dropped)
