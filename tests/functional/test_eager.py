"""What compiles, transforms or records operations meets those that are meant for it, not short ways past them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moekit import routers
from moekit.experts import GroupedGLU, GroupedMLP
from moekit.functional.eager import is_eager
from moekit.layer import MoELayer
from moekit.routers import TopKRouter
from moekit.routing import Capacity
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


TRANSFORMED = {
    "plain": lambda: (TopKRouter(8, 4, 2), GroupedGLU(4, 8, 12)),
    "biases and drops": lambda: (
        TopKRouter(8, 4, 2, capacity=Capacity(0.7, 0.7, minimum=1)), GroupedMLP(4, 8, 12, bias=True, activation="gelu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_transformed_by_torch_func(kind: str) -> None:
    """Gradients of each sequence alone, and derivatives forward, of what is elsewhere a kernel."""
    torch.manual_seed(0)
    layer = MoELayer(*TRANSFORMED[kind]()).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    parameters = dict(layer.named_parameters())
    x, along = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).hidden.square().sum()

    alone = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, one in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, one), list(parameters.values()))
        for (name, found), slow in zip(alone.items(), expected, strict=True):
            assert_close(found[number], slow, name)
    value, slope = torch.func.jvp(lambda x: layer(x).hidden, (x,), (along,))
    assert_close(value, layer(x).hidden)
    step = 1e-6
    torch.testing.assert_close(
        slope, (layer(x + step * along).hidden - layer(x - step * along).hidden) / (2 * step), rtol=1e-6, atol=1e-7
    )


ROUTERS = {
    "switch, with jitter": lambda: routers.switch(8, 4),
    "gshard": lambda: routers.gshard(8, 4),
    "expert choice": lambda: routers.ExpertChoiceRouter(8, 4),
    "sinkhorn": lambda: routers.SinkhornRouter(8, 4),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_in_training_under_vmap(name: str) -> None:
    """Nothing in a training forward reads a number, or draws what vmap cannot."""
    layer = MoELayer(ROUTERS[name](), GroupedMLP(4, 8, 12, dropout=0.1)).train()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).hidden.square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(
        parameters, torch.randn(1, 5, 8).expand(3, 5, 8)
    )
    assert all(grad.isfinite().all() for grad in found.values())
    if "jitter" in name:
        apart = found["router.weight"]
        assert not torch.equal(apart[0], apart[1]), "each draws its own"


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
