"""ReLU routing against a loop, its loss, and the coefficient that steers sparsity."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from moekit.component import components
from moekit.experts import GroupedMLP
from moekit.layer import AuxLosses, MoELayer
from moekit.routers import AdaptiveCoefficient, ReLURouter, remoe
from moekit.routing import RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens

T, D, E = 15, 5, 6


def trained(router: ReLURouter) -> ReLURouter:
    router.double()
    with torch.no_grad():
        router.weight.copy_(0.5 * torch.randn(E, D, generator=torch.Generator().manual_seed(1)))
    return router


@pytest.mark.parametrize(("padded", "exponent"), itertools.product([False, True], [0, 20, -7]))
def test_equals_the_loop(padded: bool, exponent: int) -> None:
    """Eq. 4 and 7-9: weights, and 1 / T * sum_t sum_e f_e R(x_t)_e with f_e = E / (k T) * sum_t 1{R(x_t)_e > 0}."""
    k = 1.5
    router = trained(ReLURouter(D, E, k, coefficient=AdaptiveCoefficient(0.5, start=0.25, factor=1.5)))
    router.coefficient.exponent.fill_(exponent)
    x = skewed_tokens(T, D, dtype=torch.float64, seed=1).requires_grad_()
    mask = torch.arange(T) % 5 != 2 if padded else torch.ones(T, dtype=torch.bool)
    real = mask.nonzero().flatten().tolist()
    loop: dict[tuple[int, int], Tensor] = {}
    for s, e in itertools.product(real, range(E)):
        score = (x[s] * router.weight[e]).sum()
        if float(score.detach()) > 0:
            loop[s, e] = score
    f = [E / (k * len(real)) * sum(key[1] == e for key in loop) for e in range(E)]
    penalty = sum((f[e] * score for (_, e), score in loop.items()), torch.zeros(())) / len(real)
    coefficient = torch.tensor(0.25 * 1.5**exponent, dtype=torch.float32).double()

    routing = router.train()(x, RoutingContext(mask=mask))
    assert list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == sorted(loop)
    assert_close(routing.weight, torch.stack([loop[key] for key in sorted(loop)]), "weights")
    assert float(routing.losses["sparsity"].detach()) == pytest.approx(
        float((coefficient * penalty).detach()), rel=1e-6
    )
    assert float(routing.statistics["active_experts"]) == pytest.approx(len(loop) / len(real))
    for found, expected in ((routing.weight.sum(), sum(loop.values())), (routing.losses["sparsity"], penalty)):
        for a, b in zip(
            *(torch.autograd.grad(v, (x, router.weight), retain_graph=True) for v in (found, expected)), strict=True
        ):
            assert_close(a / a.norm(), b / b.norm(), "gradient")


def test_a_token_that_no_expert_takes_gets_zeros() -> None:
    router = ReLURouter(D, E, 1)
    with torch.no_grad():
        router.weight.fill_(-1.0)
    layer = MoELayer(router, GroupedMLP(E, D, 4))
    x = torch.ones(4, D)
    x[1] = -1.0
    hidden, routing = layer(x)
    assert routing.token.tolist() == [1] * E
    assert not hidden[[0, 2, 3]].any()
    assert bool(hidden[1].any())


def test_gradcheck() -> None:
    router = trained(ReLURouter(D, E, 2, coefficient=AdaptiveCoefficient(0.5, start=1.0))).train()
    mask = torch.arange(6) != 4

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing = functional_call(router, {"weight": weight}, (x, RoutingContext(mask=mask)))
        return routing.weight, *routing.losses.values()

    x = skewed_tokens(6, D, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, router.weight.detach().requires_grad_()))


def count(active: int, pairs: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(active), torch.tensor(pairs)


def test_coefficient_moves_once_per_step_towards_the_target() -> None:
    coefficient = AdaptiveCoefficient(0.75, start=2.0, factor=1.2)
    assert float(coefficient()) == 2.0
    # 30 of 100 and 10 of 60 pairs are active: together 40 of 160, exactly a quarter; nothing moves.
    coefficient.observe(*count(30, 100))
    coefficient.observe(*count(10, 60))
    coefficient.on_step_end(1)
    assert int(coefficient.exponent) == 0
    coefficient.observe(*count(41, 160))  # denser than wanted: push harder
    coefficient.on_step_end(2)
    assert float(coefficient()) == pytest.approx(2.0 * 1.2)
    for step in (3, 4):
        coefficient.observe(*count(39, 160))
        coefficient.on_step_end(step)
    assert float(coefficient()) == pytest.approx(2.0 / 1.2)
    coefficient.on_step_end(5)  # nothing was observed
    assert int(coefficient.exponent) == -1
    coefficient.half()
    assert float(coefficient()) == pytest.approx(2.0 / 1.2)


def test_padding_is_in_no_sparsity() -> None:
    router = trained(ReLURouter(D, E, 1))
    x = skewed_tokens(T, D, dtype=torch.float64)
    mask = torch.arange(T) < 9
    router.observe(router(x, RoutingContext(mask=mask)))
    padded = router.coefficient._window.counts
    router.coefficient._window.clear()
    router.observe(router(x[:9]))
    assert torch.equal(padded, router.coefficient._window.counts)
    assert int(padded[1]) == 9 * E


def test_routers_may_share_a_coefficient() -> None:
    """As in the paper: one number for all layers, moved once by their mean sparsity."""
    shared = AdaptiveCoefficient(1 - 2 / E)
    layers = nn.ModuleList([ReLURouter(D, E, 2, coefficient=shared) for _ in range(2)])
    assert sum(isinstance(c, AdaptiveCoefficient) for c in components(layers).values()) == 1
    with torch.no_grad():
        layers[0].weight.fill_(1.0)
        layers[1].weight.fill_(-1.0)
    x = torch.ones(10, D)
    for router in layers:  # the first sends every token everywhere, the second none: a half is active
        router.observe(router(x))
    for component in components(layers).values():
        component.on_step_end(1)
    assert int(shared.exponent) == 1


def test_sparsity_reaches_the_target() -> None:
    """Training with the loss of weight 1 alone brings k of E experts per token, from half of them at first."""
    router = trained(ReLURouter(D, E, 1, coefficient=AdaptiveCoefficient(1 - 1 / E, start=1e-3))).train()
    # Not centred: of centred tokens every linear score is positive for one half, whatever the router learns.
    x = 1 + torch.randn(300, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    weigh = AuxLosses(sparsity=1.0, layers="mean")
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    active = []
    for step in range(300):
        routing = router(x)
        sums = torch.zeros(300, dtype=torch.float64).index_add(0, routing.token, routing.weight)
        loss = (sums - target).square().mean() + weigh(routing)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        router.observe(routing)
        router.coefficient.on_step_end(step + 1)
        active.append(float(routing.statistics["active_experts"]))
    assert active[0] > 2.0
    assert sum(active[-50:]) / 50 == pytest.approx(1.0, abs=0.25)


def test_preset_and_refusals() -> None:
    with seeded(0):
        router = remoe(D, E)
    assert (router.coefficient.start, router.coefficient.factor) == (1e-8, 1.2)
    assert router.coefficient.target == pytest.approx(1 - 1 / E)
    for k in (0, 7):
        with pytest.raises(ValueError, match="k must be above 0 and at most num_experts"):
            ReLURouter(D, E, k)
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\): got 1"):
        AdaptiveCoefficient(1.0)
    with pytest.raises(ValueError, match="start > 0 and factor > 1"):
        AdaptiveCoefficient(0.5, start=1.0, factor=1.0)
