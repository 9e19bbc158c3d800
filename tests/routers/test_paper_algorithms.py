"""GShard, Switch, ST-MoE and Z-code M3: decisions, weights, losses and gradients equal the papers' loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from paper_loops import Decisions, best, gshard_loop, softmax, switch_loop
from torch import Tensor

from moekit import routers
from moekit.routing import Router, Routing, RoutingContext
from moekit.testing import assert_close, skewed_tokens

T, D, E = 40, 6, 5
CASES = list(itertools.product([0, 1, 2], [0.6, 1.0], [False, True]))  # seed, capacity factor, with padding


def inputs(router: Router, seed: int, padded: bool) -> tuple[Tensor, RoutingContext, set[int]]:
    """Tokens that crowd at one expert, a router in float64 whose scores are spread out, and who is real."""
    router.double().train()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(seed)))
    x = skewed_tokens(T, D, dtype=torch.float64, seed=seed) / 2
    mask = torch.arange(T) % 5 != 3 if padded else torch.ones(T, dtype=torch.bool)
    return x, RoutingContext(mask=mask), set(mask.nonzero().flatten().tolist())


def compare(router: Router, routing: Routing, loop: Decisions, x: Tensor, balance_scale: float) -> None:
    """Every decision, every weight, the loss, and the gradients to x and the router."""
    k = routing.token.numel() // T
    for (s, choice), expert in loop.expert.items():
        n = choice * T + s
        assert int(routing.token[n]) == s
        assert int(routing.expert[n]) == expert
        assert int(routing.position[n]) == loop.place[s, choice], f"token {s}, choice {choice}"
        assert bool(routing.kept[n]) == loop.kept[s, choice]
        assert_close(routing.weight[n], loop.weight[s, choice], f"weight of token {s}, choice {choice}")
    assert int(routing.queued.sum()) == sum(place >= 0 for place in loop.place.values())
    assert k * T == routing.kept.numel()
    balance = routing.losses["load_balance"]
    assert_close(balance * balance_scale, loop.balance, "balance loss")
    values = torch.cos(torch.arange(T * E, dtype=torch.float64)).view(T, E)
    output = (routing.weight * routing.kept * values[routing.token, routing.expert]).sum()
    assert_close(output, loop.output(values), "weighted sum")
    leaves = (x, router.weight)
    found = torch.autograd.grad(output + balance * balance_scale, leaves)
    expected = torch.autograd.grad(loop.output(values) + loop.balance, leaves)
    for name, a, b in zip(("x", "router"), found, expected, strict=True):
        assert_close(a, b, f"gradient of {name}")


def assert_something_was_dropped(loop: Decisions) -> None:
    assert any(place >= 0 and not loop.kept[key] for key, place in loop.place.items()), "the case tests nothing"


def draws_of(monkeypatch: pytest.MonkeyPatch, seed: int) -> Tensor:
    """Draws for every token's second choice, and torch.rand_like answering with them."""
    uniform = torch.rand(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def rand_like(weight: Tensor) -> Tensor:
        assert weight.shape == (T, 1)
        return uniform[:, None].to(weight.dtype)

    monkeypatch.setattr(torch, "rand_like", rand_like)
    return uniform


@pytest.mark.parametrize(("seed", "factor", "padded"), CASES)
def test_switch(seed: int, factor: float, padded: bool) -> None:
    router = routers.switch(D, E, capacity_factor=factor, jitter=0.0)
    x, context, real = inputs(router, seed, padded)
    x.requires_grad_()
    loop = switch_loop(x, router.weight, factor, range(T), real)
    compare(router, router(x, context), loop, x, balance_scale=1.0)
    if factor < 1:
        assert_something_was_dropped(loop)


@pytest.mark.parametrize(("seed", "factor", "padded"), CASES)
def test_zcode_m3(seed: int, factor: float, padded: bool) -> None:
    """Random token selection: the loop serves tokens in the order of the same draws."""
    router = routers.zcode_m3(D, E, capacity_factor=factor, jitter=0.0)
    x, context, real = inputs(router, seed, padded)
    x.requires_grad_()
    torch.manual_seed(seed)
    draws = torch.rand(1, T)[0]
    torch.manual_seed(seed)
    routing = router(x, context)
    order = sorted(range(T), key=lambda s: draws[s].item())
    loop = switch_loop(x, router.weight, factor, order, real)
    compare(router, routing, loop, x, balance_scale=1.0)
    if factor < 1:
        assert_something_was_dropped(loop)


@pytest.mark.parametrize(("seed", "factor", "padded"), CASES)
def test_gshard(seed: int, factor: float, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    router = routers.gshard(D, E, capacity_factor=factor)
    x, context, real = inputs(router, seed, padded)
    x.requires_grad_()
    uniform = draws_of(monkeypatch, seed)
    loop = gshard_loop(x, router.weight, factor, range(T), real, uniform)
    assert {place == -1 for (_, choice), place in loop.place.items() if choice == 1} == {True, False}
    compare(router, router(x, context), loop, x, balance_scale=1 / E**2)
    if factor < 1:
        assert_something_was_dropped(loop)


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize(("seed", "factor", "padded"), CASES)
def test_st_moe(seed: int, factor: float, padded: bool, prioritised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threshold 0.2; an expert has factor * T / E slots; with batch priority the most probable tokens are first."""
    router = routers.st_moe(D, E, capacity_factor=factor, batch_prioritised=prioritised)
    x, context, real = inputs(router, seed, padded)
    x.requires_grad_()
    uniform = draws_of(monkeypatch, seed)
    order: list[int] = list(range(T))
    if prioritised:
        order.sort(key=lambda s: -softmax(x[s].detach(), router.weight.detach()).max().item())
    # The loop's capacity is GShard's, factor * 2 T / E.
    loop = gshard_loop(x, router.weight, factor / 2, order, real, uniform, threshold=0.2)
    assert {place == -1 for (_, choice), place in loop.place.items() if choice == 1} == {True, False}
    routing = router(x, context)
    compare(router, routing, loop, x, balance_scale=1 / E**2)
    scores = [torch.stack([(x[s] * row).sum() for row in router.weight]) for s in real]
    literal_z = sum(float(row.exp().sum().log() ** 2) for row in (r.detach() for r in scores)) / len(real)
    assert float(routing.losses["router_z"].detach()) == pytest.approx(literal_z, rel=1e-12)
    if factor < 1:
        assert_something_was_dropped(loop)


def test_st_moe_drops_three_of_eight_choices_where_both_are_sent() -> None:
    """Capacity 1.25 T / E for 2 T choices (arXiv:2202.08906 section 4.2): 37.5 % find no room at even load."""
    torch.manual_seed(0)
    tokens, experts = 4000, 8
    router = routers.st_moe(D, experts, threshold=1e-9).train()
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(tokens, D)
    x = torch.cat([x, -x])
    paper, choices = router(x), routers.st_moe(D, experts, capacity_share="choices")
    assert paper.capacity == 1.25 * 2 * tokens / experts
    assert int(paper.queued.sum()) == 2 * 2 * tokens
    assert float((paper.queued & ~paper.kept).float().mean()) >= 0.375
    assert router.eval()(x).capacity == 2.0 * 2 * tokens / experts
    choices.train()
    assert choices(x).capacity == 1.25 * 2 * 2 * tokens / experts


def test_arms_of_st_moe() -> None:
    """One and three experts, another threshold, noise: what sections 3 and 4.2 and appendix C compare."""
    one, three = routers.st_moe(D, E, k=1), routers.st_moe(D, E, k=3, threshold=0.05, jitter=1e-2)
    assert (one.k, one.renormalise) == (1, "none")
    assert (three.k, three.renormalise, three.second_expert) == (3, "before_drop", routers.RandomChoice(0.05))
    assert one.exploration is None
    assert three.exploration == routers.InputJitter(1e-2)


def test_second_expert_is_sent_with_the_right_probability() -> None:
    """Over many draws the second choice of a token is sent in a share min(1, weight / threshold) of them."""
    for build, threshold in ((routers.gshard, 0.5), (routers.st_moe, 0.2)):
        router = build(2, 2, capacity_factor=None).train()
        with torch.no_grad():
            router.weight.copy_(torch.eye(2))
        probs = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.75, 0.25], [0.6, 0.4]])
        tokens = probs.log().repeat_interleave(4000, 0)
        sent = router(tokens).queued.view(2, 4, 4000)[1].float().mean(1)
        expected = (probs[:, 1] / threshold).clamp_max(1.0)
        assert float((sent - expected).abs().max()) < 0.03  # four standard errors
        assert bool(router.eval()(tokens).queued.all())


def test_three_choices_are_sent_each_by_its_own_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """k = 3 with a random choice: the first always, second and third each by its renormalised weight."""
    router = routers.TopKRouter(
        D, E, k=3, renormalise="before_drop", second_expert=routers.RandomChoice(0.3), init_scale=1.0
    )
    x, _, _ = inputs(router, 0, False)
    uniform = torch.rand(T, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda weight: uniform)
    routing = router(x)
    for s in range(T):
        probs = softmax(x[s], router.weight)
        chosen = best(probs, 3)
        weights = [probs[e] / sum(probs[c] for c in chosen) for e in chosen]
        for choice in range(3):
            n = choice * T + s
            assert int(routing.expert[n]) == chosen[choice]
            assert_close(routing.weight[n], weights[choice])
            sent = choice == 0 or weights[choice].item() / 0.3 > float(uniform[s, choice - 1])
            assert bool(routing.queued[n]) == sent
    assert 0 < int(routing.queued.view(3, T)[1:].sum()) < 2 * T
