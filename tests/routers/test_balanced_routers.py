"""Expert choice, Sinkhorn and uniform routing against literal loops: decisions, weights, gradients, balance."""

from __future__ import annotations

import itertools
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from moekit.functional import router_z, sinkhorn
from moekit.routers import ExpertChoiceRouter, SinkhornRouter, UniformRouter
from moekit.routing import Capacity, Router, RoutingContext
from moekit.testing import assert_close, seeded, skewed_tokens, some_mask

T, D, E = 40, 6, 5
R = TypeVar("R", bound=Router)


def spread(router: R) -> R:
    """Scores that differ clearly, in float64."""
    router.double().train()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(1)))  # type: ignore[union-attr]
    return router


def tokens() -> Tensor:
    return skewed_tokens(T, D, dtype=torch.float64, seed=1) / 2


@pytest.mark.parametrize(("factor", "padded", "training"), itertools.product([0.5, 2.0, 4.9], [False, True], [0, 1]))
def test_expert_choice_equals_the_loop(factor: float, padded: bool, training: int) -> None:
    router = spread(ExpertChoiceRouter(D, E, capacity_factor=factor)).train(bool(training))
    x, mask = tokens().requires_grad_(), some_mask(T) if padded else torch.ones(T, dtype=torch.bool)
    routing = router(x, RoutingContext(mask=mask))
    slots = int(-(-factor * T // E))
    assert routing.capacity == slots
    probs = (x @ router.weight.t()).softmax(-1)
    expected = {}
    for e in range(E):
        best = sorted(mask.nonzero().flatten().tolist(), key=lambda s, e=e: -probs[s, e].item())[:slots]
        expected |= {(s, e): place for place, s in enumerate(best)}
    kept = routing.kept
    pairs = list(zip(routing.token[kept].tolist(), routing.expert[kept].tolist(), strict=True))
    assert dict(zip(pairs, routing.position[kept].tolist(), strict=True)) == expected
    assert len(pairs) == len(expected)
    assert bool((routing.position[~kept] == -1).all())
    s, e = (torch.tensor(ids) for ids in zip(*pairs, strict=True))
    assert_close(routing.weight[kept], probs[s, e])
    leaves = (x, router.weight)
    value = torch.cos(3.0 * s + e)
    for a, b in zip(
        torch.autograd.grad((routing.weight[kept] * value).sum(), leaves, retain_graph=True),
        torch.autograd.grad((probs[s, e] * value).sum(), leaves, retain_graph=True),
        strict=True,
    ):
        assert_close(a, b, "gradient")
    assert_close(routing.losses["router_z"], router_z(x @ router.weight.t(), mask))
    assert "load_balance" not in routing.losses


def test_expert_choice_loads_all_experts_alike_and_tokens_unlike() -> None:
    routing = spread(ExpertChoiceRouter(D, E))(tokens())
    assert torch.bincount(routing.expert).tolist() == [16] * E
    by_token = torch.bincount(routing.token, minlength=T)
    assert int(by_token.min()) < 2 < int(by_token.max())


def test_expert_choice_evaluates_as_it_trains_unless_told() -> None:
    router = spread(ExpertChoiceRouter(D, E, capacity_factor=1.0))
    assert router.train()(tokens()).capacity == router.eval()(tokens()).capacity == 8
    assert spread(ExpertChoiceRouter(D, E, eval_capacity_factor=0.5)).eval()(tokens()).capacity == 4


@pytest.mark.parametrize(
    ("factor", "message"), [(None, "there is no dropless form"), (0.0, "must be a positive factor")]
)
def test_expert_choice_needs_a_factor(factor: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertChoiceRouter(D, E, capacity_factor=factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("router", [ExpertChoiceRouter, SinkhornRouter])
def test_what_looks_ahead_is_refused_in_a_causal_decoder(router: type[Router]) -> None:
    with pytest.raises(ValueError, match=f"{router.__name__} lets a token's route depend on later tokens"):
        router(D, E).check_causal()
    router(D, E, allow_future=True).check_causal()


@pytest.mark.parametrize(
    ("k", "activation", "padded", "training"), itertools.product([1, 2], ["softmax", "sigmoid"], [False, True], [0, 1])
)
def test_sinkhorn_router_equals_the_loop(k: int, activation: str, padded: bool, training: int) -> None:
    router = spread(SinkhornRouter(D, E, k, activation=activation, iterations=1000, tol=1e-9))  # type: ignore[arg-type]
    router.train(bool(training))
    x, mask = tokens().requires_grad_(), some_mask(T) if padded else torch.ones(T, dtype=torch.bool)
    routing = router(x, RoutingContext(mask=mask))
    logits = x @ router.weight.t()
    plan = logits.detach().exp() * mask[:, None]
    for _ in range(1000):
        plan = plan / plan.sum(1, keepdim=True).clamp_min(1e-300)
        plan = plan / plan.sum(0) * mask.sum() / E
    score = plan if training else logits.detach()
    weight = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    expert, found = routing.expert.view(k, T).t(), routing.weight.view(k, T).t()
    terms = []
    for s in mask.nonzero().flatten().tolist():
        best = sorted(range(E), key=lambda e, s=s: -score[s, e].item())[:k]
        assert expert[s].tolist() == best
        assert_close(found[s], weight[s, best])
        terms.append((weight[s, best] * torch.cos(torch.arange(k) + s)).sum())
    assert torch.equal(routing.queued, mask.repeat(k))
    ours = (found * torch.cos(torch.arange(k) + torch.arange(T)[:, None]) * mask[:, None]).sum()
    leaves = (x, router.weight)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, retain_graph=True),
        torch.autograd.grad(torch.stack(terms).sum(), leaves),
        strict=True,
    ):
        assert_close(a, b, "gradient: through the weight alone")


def test_sinkhorn_balances_in_training_only() -> None:
    router = spread(SinkhornRouter(D, E))
    x = skewed_tokens(400, D, dtype=torch.float64, seed=1) / 2
    heaviest = [int(torch.bincount(router.train(t)(x).expert, minlength=E).max()) for t in (True, False)]
    assert heaviest[0] < 1.25 * 400 / E
    assert heaviest[1] > 2 * 400 / E


def test_sinkhorn_router_honours_its_limits() -> None:
    few = spread(SinkhornRouter(D, E, iterations=1))
    logits = tokens() @ few.weight.t()
    assert torch.equal(few(tokens()).expert, sinkhorn(logits, iterations=1).argmax(-1))
    assert not torch.equal(few(tokens()).expert, sinkhorn(logits, iterations=1000).argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "k must be between 1 and num_experts: got k=6 and num_experts=5"),
        ({"activation": "relu"}, 'activation must be "softmax" or "sigmoid": got \'relu\''),
        ({"iterations": 0}, "needs iterations of at least 1 and tol of at least 0: got 0 and"),
        ({"tol": -1.0}, "needs iterations of at least 1 and tol of at least 0: got 100 and -1.0"),
    ],
)
def test_sinkhorn_router_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SinkhornRouter(D, E, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("t", "k", "order", "padded"), itertools.product([0, 1, 7, 40], [1, 2, 5], ["round_robin", "random"], [False, True])
)
def test_uniform_deals_evenly(t: int, k: int, order: str, padded: bool) -> None:
    """No two experts differ by more than one; a token's experts differ; weights sum to 1."""
    router = UniformRouter(E, k, order=order).train()  # type: ignore[arg-type]
    mask = some_mask(t) if padded else torch.ones(t, dtype=torch.bool)
    with seeded(0):
        routing = router(torch.randn(t, D), RoutingContext(mask=mask))
    load = torch.bincount(routing.expert[routing.queued], minlength=E)
    assert int(load.max() - load.min()) <= 1
    assert int(load.sum()) == k * int(mask.sum())
    expert = routing.expert.view(k, t).t()
    assert all(len(set(row)) == k for row in expert.tolist())
    assert_close(routing.weight.view(k, t).sum(0), torch.ones(t))


def test_uniform_in_token_order() -> None:
    mask = torch.tensor([True, False, True, True, True, True, True, True])
    for training in (True, False):
        routing = UniformRouter(E).train(training)(torch.randn(8, D), RoutingContext(mask=mask))
        assert routing.expert[mask].tolist() == [0, 1, 2, 3, 4, 0, 1]
    two = UniformRouter(E, 2)(torch.randn(3, D))
    assert two.expert.view(2, 3).t().tolist() == [[0, 1], [2, 3], [4, 0]]


def test_uniform_random_shuffles_in_training_only() -> None:
    router = UniformRouter(E, order="random")
    x = torch.randn(T, D)
    with seeded(1):
        first, second = router.train()(x).expert, router(x).expert
    dealt = router.eval()(x).expert
    assert not torch.equal(first, second)
    assert not torch.equal(first, dealt)
    assert torch.equal(dealt, torch.arange(T) % E)


def test_uniform_drops_nothing_at_factor_one() -> None:
    router = UniformRouter(E, 2, order="random", capacity=Capacity(train=1.0, minimum=1)).train()
    routing = router(torch.randn(T, D))
    assert routing.capacity == 2 * T // E
    assert bool(routing.kept.all())


@pytest.mark.parametrize(("options", "message"), [({"k": 0}, "k must be between"), ({"order": "x"}, "order must be")])
def test_uniform_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformRouter(E, **options)  # type: ignore[arg-type]
