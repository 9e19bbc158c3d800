"""Noisy top-k and the two-level gate against loops written from the equations of Shazeer et al."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moekit.routers import HierarchicalRouter, NoisyTopKRouter, noisy_topk
from moekit.routing import Capacity, Router, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens

T, D, E, A, B = 14, 5, 6, 4, 3

NODES, NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(120))


def phi(z: Tensor) -> Tensor:
    """The normal distribution function by numerical integration of its density (Gauss-Legendre from -9)."""
    if z < -9:
        return z * 0
    if z > 9:
        return z * 0 + 1
    half = (z + 9) / 2
    points = -9 + half * (NODES + 1)
    return half * (NODE_WEIGHTS * (-points.square() / 2).exp()).sum() / (2 * torch.pi) ** 0.5


class Gate:
    """One noisy gate for one token: equations 3 to 5, 8 and 9."""

    def __init__(self, x: Tensor, score: Tensor, noise: Tensor, draw: Tensor, k: int) -> None:
        experts = range(score.shape[0])
        self.clean = [(x * score[i]).sum() for i in experts]
        self.scale = [(1 + (x * noise[i]).sum().exp()).log() for i in experts]
        self.noisy = [self.clean[i] + draw[i] * self.scale[i] for i in experts]
        self.k, self.experts = k, experts
        self.chosen = sorted(experts, key=lambda i: -float(self.noisy[i].detach()))[:k]
        total = sum((self.noisy[i].exp() for i in self.chosen), torch.zeros(()))
        self.weight = {i: self.noisy[i].exp() / total for i in self.chosen}

    def probability(self, i: int) -> Tensor:
        others = sorted((self.noisy[j] for j in self.experts if j != i), key=lambda h: -float(h.detach()))
        return phi((self.clean[i] - others[self.k - 1]) / self.scale[i])


def squared_cv(totals: list[Tensor]) -> Tensor:
    values = torch.stack(totals)
    mean = sum(totals, torch.zeros(())) / len(totals)
    return sum(((v - mean) ** 2 for v in values), torch.zeros(())) / len(totals) / mean**2


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def trained(router: Router) -> Router:
    """In float64, with matrices as training might leave them."""
    router.double()
    with torch.no_grad():
        for n, parameter in enumerate(router.parameters()):
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
    return router


def tokens(padded: bool, seed: int) -> tuple[Tensor, RoutingContext, list[int]]:
    x = skewed_tokens(T, D, dtype=torch.float64, seed=seed).requires_grad_()
    mask = torch.arange(T) % 5 != 2 if padded else torch.ones(T, dtype=torch.bool)
    return x, RoutingContext(mask=mask), mask.nonzero().flatten().tolist()


def compare(
    router: Router, x: Tensor, context: RoutingContext, seed: int, loop: dict[tuple[int, int], Tensor], losses: Tensor
) -> None:
    """Who was chosen, with what weight, the losses (importance, load), and every gradient."""
    with seeded(seed):
        routing = router(x, context)
    found = {(int(t), int(e)): n for n, (t, e) in enumerate(zip(routing.token, routing.expert, strict=True))}
    assert {key for key, n in found.items() if routing.kept[n]} == set(loop)
    for key, weight in loop.items():
        assert_close(routing.weight[found[key]], weight, f"weight of {key}")
    for name, loss in zip(("importance", "load"), losses, strict=True):
        assert_close(routing.losses[name], loss, name)
    values = torch.cos(torch.arange(T * router.num_experts, dtype=torch.float64)).view(T, -1)
    scalar = (routing.weight * routing.kept * values[routing.token, routing.expert]).sum()
    expected = sum((weight * values[key] for key, weight in loop.items()), zero())
    leaves = (x, *router.parameters())
    if router.training:
        scalar = scalar + routing.losses["importance"] + routing.losses["load"]
        expected = expected + losses.sum()
    pairs = zip(*(torch.autograd.grad(s, leaves, allow_unused=True) for s in (scalar, expected)), strict=True)
    for (name, leaf), (a, b) in zip([("x", x), *router.named_parameters()], pairs, strict=True):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        assert_close(a, b, f"gradient of {name}", floor=1e-3)


@pytest.mark.parametrize(
    ("k", "training", "padded"), [*itertools.product([2, 3], [True, False], [False, True]), (E, True, True)]
)
def test_noisy_topk_equals_the_equations(k: int, training: bool, padded: bool) -> None:
    router = trained(NoisyTopKRouter(D, E, k)).train(training)
    x, context, real = tokens(padded, seed=k)
    with seeded(5):
        draw = torch.randn(T, E, dtype=torch.float64) if training else torch.zeros(T, E, dtype=torch.float64)
    gates = {s: Gate(x[s], router.weight, router.noise_weight, draw[s], k) for s in real}
    loop = {(s, i): gates[s].weight[i] for s in real for i in gates[s].chosen}
    importance = [sum((gates[s].weight.get(i, zero()) for s in real), zero()) for i in range(E)]
    if training and k < E:
        load = [sum((gates[s].probability(i) for s in real), zero()) for i in range(E)]
    else:
        load = [zero() + sum(i in gates[s].chosen for s in real) for i in range(E)]
    compare(router, x, context, 5, loop, torch.stack([squared_cv(importance), squared_cv(load)]))


@pytest.mark.parametrize(("training", "padded"), itertools.product([True, False], [False, True]))
def test_two_levels_equal_the_equations(training: bool, padded: bool) -> None:
    """Appendix B: weights are products; Load_H(i, j) = Load_primary(i) * Load_i(X_i)_j / |X_i|."""
    router = trained(HierarchicalRouter(D, A, B)).train(training)
    x, context, real = tokens(padded, seed=3)
    with seeded(5):
        draw = torch.randn(T, A, dtype=torch.float64) * training
        inner_draw = torch.randn(2, T, B, dtype=torch.float64) * training
    primary = {s: Gate(x[s], router.weight, router.noise_weight, draw[s], 2) for s in real}
    secondary = {
        (s, i): Gate(x[s], router.secondary_weight[i], router.secondary_noise_weight[i], inner_draw[choice, s], 2)
        for s in real
        for choice, i in enumerate(primary[s].chosen)
    }
    loop, totals, loads = {}, [zero()] * (A * B), []
    for (s, i), gate in secondary.items():
        for j in gate.chosen:
            loop[s, i * B + j] = primary[s].weight[i] * gate.weight[j]
            totals[i * B + j] = totals[i * B + j] + loop[s, i * B + j]
    for i, j in itertools.product(range(A), range(B)):
        inside = [gate for (_, group), gate in secondary.items() if group == i]
        if not training:
            loads.append(zero() + sum(j in gate.chosen for gate in inside))
        elif inside:
            outer = sum((primary[s].probability(i) for s in real), zero())
            loads.append(outer * sum((gate.probability(j) for gate in inside), zero()) / len(inside))
        else:
            loads.append(zero())
    compare(router, x, context, 5, loop, torch.stack([squared_cv(totals), squared_cv(loads)]))
    if training:  # the paper's reason for this form: the primary gate learns from it
        with seeded(5):
            routing = router(x, context)
        (grad,) = torch.autograd.grad(routing.losses["load"], router.weight)
        assert float(grad.norm()) > 1e-6


def test_a_group_that_nobody_chose_has_no_load() -> None:
    router = trained(HierarchicalRouter(D, A, B)).train()
    with torch.no_grad():
        router.weight[0] = -50.0
        router.noise_weight.zero_()
    x = torch.ones(T, D, dtype=torch.float64)
    routing = router(x)
    assert not (routing.expert < B).any()
    for name, loss in routing.losses.items():
        assert bool(loss.isfinite()), name
        for grad in torch.autograd.grad(loss, list(router.parameters()), retain_graph=True, allow_unused=True):
            assert grad is None or bool(grad.isfinite().all())


@pytest.mark.parametrize("build", [lambda: NoisyTopKRouter(D, E, 2), lambda: HierarchicalRouter(D, A, B)])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_weights_and_losses(build: type[Router], training: bool) -> None:
    router = trained(build()).train(training)
    names = [name for name, _ in router.named_parameters()]
    mask = torch.arange(6) != 4
    skip = () if training else ("load",)  # the plain counts of evaluation have no gradient

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        with seeded(2):
            routing = functional_call(router, dict(zip(names, parameters, strict=True)), (x, RoutingContext(mask=mask)))
        return routing.weight * routing.kept, *(v for n, v in routing.losses.items() if n not in skip)

    x = skewed_tokens(6, D, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *(p.detach().requires_grad_() for p in router.parameters())))


def test_the_start_is_balanced_noise() -> None:
    """Zero matrices: every expert is as likely as any other, and evaluation has nothing to go by."""
    for router in (noisy_topk(D, 8), HierarchicalRouter(D, 4, 4)):
        assert not any(parameter.any() for parameter in router.parameters())
        with seeded(0):
            routing = router.train()(torch.randn(4000, D))
        load = torch.bincount(routing.expert, minlength=router.num_experts).float()
        assert float(load.max() / load.mean()) < 1.2
        assert float(routing.losses["importance"].detach()) < 0.01
        assert float(routing.losses["load"].detach()) < 0.01
    assert float(noisy_topk(D, 8).train()(torch.randn(5, D)).statistics["noise"]) == pytest.approx(np.log(2))


def test_weights_of_a_token_sum_to_one_and_reach_all_matrices() -> None:
    for router in (noisy_topk(D, 8), HierarchicalRouter(D, 4, 4)):
        routing = router.train()(torch.randn(9, D))
        sums = torch.zeros(9).index_add(0, routing.token, routing.weight)
        assert_close(sums, torch.ones(9))
        values = torch.cos(torch.arange(routing.weight.numel()))
        (routing.weight * values).sum().backward()
        for name, parameter in router.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), f"{name} learns nothing from the task"


def test_losses_balance() -> None:
    """A router that sends everything to two experts spreads out by descending its two losses."""
    router = NoisyTopKRouter(D, E, 2).train()
    with torch.no_grad():
        router.weight[:2] = 2.0
    x = torch.rand(200, D) + 0.5
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    seen = []
    with seeded(0):
        for _ in range(60):
            routing = router(x)
            seen.append(float(torch.bincount(routing.expert, minlength=E).max()) / (len(x) * 2 / E))
            optimizer.zero_grad()
            (0.1 * routing.losses["importance"] + 0.1 * routing.losses["load"]).backward()
            optimizer.step()
    assert seen[0] > 2.5
    assert seen[-1] < 1.5


def test_capacity_drops_after_the_losses_have_counted() -> None:
    router, tight = (NoisyTopKRouter(D, E, 2, capacity=Capacity(train=f, minimum=1)) for f in (None, 0.5))
    x = torch.randn(40, D)
    with seeded(1):
        free = router(x)
    with seeded(1):
        dropped = tight(x)
    assert dropped.capacity == 7
    assert int(dropped.kept.sum()) < int(free.kept.sum())
    for name in free.losses:
        assert torch.equal(free.losses[name], dropped.losses[name])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="k between 2 and num_experts: got k=1 and num_experts=6"):
        NoisyTopKRouter(D, E, 1)
    with pytest.raises(ValueError, match="got k=7"):
        NoisyTopKRouter(D, E, 7)
    with pytest.raises(ValueError, match="k_groups between 2 and num_groups: got k_groups=1 and num_groups=4"):
        HierarchicalRouter(D, A, B, k_groups=1)
    with pytest.raises(ValueError, match="k_experts between 2 and group_size: got k_experts=4 and group_size=3"):
        HierarchicalRouter(D, A, B, k_experts=4)
