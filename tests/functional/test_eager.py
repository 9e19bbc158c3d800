"""What compiles, transforms or records operations meets those that are meant for it, not short ways past them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moekit.experts import GroupedGLU
from moekit.functional.eager import is_eager
from moekit.layer import MoELayer
from moekit.routers import TopKRouter
from moekit.testing import assert_close


@pytest.fixture
def layer() -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(TopKRouter(8, 4, 2), GroupedGLU(4, 8, 12)).double().eval()


def test_who_is_noticed() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_eager())
        return x * 2

    look(torch.ones(2))
    torch.vmap(look)(torch.ones(2))
    make_fx(look)(torch.ones(2))
    with FlopCounterMode(display=False):
        look(torch.ones(2))
    look(torch.ones(2))
    assert seen == [True, False, False, False, True]


@torch.no_grad()
def test_a_layer_under_vmap(layer: MoELayer) -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    found = torch.vmap(lambda row: layer(row[None]).hidden[0])(x)
    assert_close(found, layer(x).hidden)


@torch.no_grad()
def test_a_traced_layer_routes_anew(layer: MoELayer) -> None:
    x, other = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    assert_close(make_fx(lambda x: layer(x).hidden)(x)(other), layer(other).hidden)


def test_as_many_operations_are_counted_without_gradients(layer: MoELayer) -> None:
    counts = []
    for wanted in (True, False):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.moekit.grouped_mm: lambda *a, **k: 1})
        with counter, torch.set_grad_enabled(wanted):
            layer(torch.randn(3, 5, 8, dtype=torch.float64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_the_gradient_of_a_gradient(layer: MoELayer) -> None:
    x, along = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer(x).hidden.square().sum(), x, create_graph=True)[0]

    x.requires_grad_()
    (found,) = torch.autograd.grad((gradient(x) * along).sum(), x)
    step = 1e-6
    ends = [gradient((x.detach() + sign * step * along).requires_grad_()) for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]).detach() / (2 * step), rtol=1e-6, atol=1e-7)
