"""Overflow sent on: against a literal loop, decisions, weights, losses and gradients; and its limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moekit.functional import load_balance
from moekit.routers import Balance, NoTokenLeftBehind, TopKRouter
from moekit.routing import Capacity, RoutingContext
from moekit.testing import assert_close, check_routing, skewed_tokens, some_mask

T, D, E = 40, 6, 5


def router_of(k: int, factor: float, rounds: int | None, **options: object) -> TopKRouter:
    priority = options.pop("priority", "position")
    capacity = Capacity(train=factor, minimum=1, priority=priority)  # type: ignore[arg-type]
    router = TopKRouter(D, E, k, capacity=capacity, overflow=NoTokenLeftBehind(rounds), **options)  # type: ignore[arg-type]
    router.double().train()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(2)))
    return router


def tokens() -> Tensor:
    return skewed_tokens(T, D, dtype=torch.float64, seed=1) / 2


def loop(
    probs: Tensor, k: int, capacity: int, rounds: int, order: list[int], real: set[int]
) -> dict[tuple[int, int], tuple[int, bool]]:
    """Expert and whether kept, by (token, choice): first tries, then round after round for those without a place."""
    ranking = [sorted(range(E), key=lambda e, s=s: -probs[s, e].item()) for s in range(T)]
    untried = {s: ranking[s][k:] for s in range(T)}
    load = [0] * E
    result: dict[tuple[int, int], tuple[int, bool]] = {}
    asks = [(s, choice) for choice in range(k) for s in order if s in real]
    for s, choice in asks:
        e = ranking[s][choice]
        result[s, choice] = (e, load[e] < capacity)
        load[e] += load[e] < capacity
    for _ in range(rounds):
        for s, choice in asks:
            if not result[s, choice][1] and untried[s]:
                e = untried[s].pop(0)
                if load[e] < capacity:
                    load[e] += 1
                    result[s, choice] = (e, True)
    return result


@pytest.mark.parametrize(
    ("k", "factor", "rounds", "priority", "padded"),
    itertools.product([1, 2], [0.5, 1.0], [None, 1], ["position", "probability"], [False, True]),
)
def test_equals_the_loop(k: int, factor: float, rounds: int | None, priority: str, padded: bool) -> None:
    router = router_of(k, factor, rounds, priority=priority)
    x, mask = tokens().requires_grad_(), some_mask(T) if padded else torch.ones(T, dtype=torch.bool)
    context = RoutingContext(mask=mask)
    routing = router(x, context)
    check_routing(routing, context)
    probs = (x @ router.weight.t()).softmax(-1)
    order = list(range(T))
    if priority == "probability":
        order.sort(key=lambda s: -probs[s].max().item())
    real = set(mask.nonzero().flatten().tolist())
    assert routing.capacity is not None
    expected = loop(probs.detach(), k, routing.capacity, rounds or E, order, real)
    terms = []
    for (s, choice), (e, kept) in expected.items():
        n = choice * T + s
        assert (int(routing.expert[n]), bool(routing.kept[n])) == (e, kept), f"token {s}, choice {choice}"
        assert bool(routing.queued[n])
        assert_close(routing.weight[n], probs[s, e], f"weight of token {s}, choice {choice}")
        terms.append(probs[s, e] * (n % 7 - 3) * kept)
    moved = [key for key, (e, _) in expected.items() if e not in probs[key[0]].topk(k).indices.tolist()]
    assert moved, "the case tests nothing"
    place = torch.arange(k * T) % 7 - 3
    real_n = mask.repeat(k)
    found = torch.autograd.grad((routing.weight * place * routing.kept * real_n).sum(), (x, router.weight))
    wanted = torch.autograd.grad(torch.stack(terms).sum(), (x, router.weight))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("k", [1, 2])
def test_nothing_is_left_behind_where_there_is_room(k: int) -> None:
    """Capacity factor 1, every round: all kept, every expert exactly full; without it some were dropped."""
    routing = router_of(k, 1.0, None)(tokens())
    assert bool(routing.kept.all())
    assert torch.bincount(routing.expert).tolist() == [k * T // E] * E
    token_expert = routing.token * E + routing.expert
    assert token_expert.unique().numel() == k * T, "a token went to one expert twice"
    without = router_of(k, 1.0, None)
    without.overflow = None
    assert not bool(without(tokens()).kept.all())


def test_dropless_stays_as_it_is() -> None:
    router = router_of(2, 1.0, None).eval()
    routing = router(tokens())
    assert routing.capacity is None
    plain = TopKRouter(D, E, 2).double().eval()
    plain.load_state_dict(router.state_dict())
    expected = plain(tokens())
    for name in ("expert", "weight", "position", "kept"):
        assert torch.equal(getattr(routing, name), getattr(expected, name))


@pytest.mark.parametrize("when", ["before_drop", "after_drop"])
def test_the_loss_counts_first_tries_or_ends(when: str) -> None:
    router = router_of(1, 0.6, None, balance=Balance(when=when))  # type: ignore[arg-type]
    routing = router(tokens())
    probs = (tokens() @ router.weight.t()).softmax(-1)
    if when == "before_drop":
        expected = load_balance(probs, probs.argmax(-1, keepdim=True))
    else:
        expected = load_balance(probs, routing.expert[:, None], routing.kept[:, None])
    assert_close(routing.losses["load_balance"], expected)


@pytest.mark.parametrize("renormalise", ["before_drop", "after_drop"])
def test_weights_are_those_of_the_experts_that_took_the_token(renormalise: str) -> None:
    router = router_of(2, 0.5, None, renormalise=renormalise)
    routing = router(tokens())
    probs = (tokens() @ router.weight.t()).softmax(-1)
    weight, expert, kept = (getattr(routing, name).view(2, T).t() for name in ("weight", "expert", "kept"))
    chosen = probs.gather(1, expert)
    if renormalise == "before_drop":
        assert_close(weight, chosen / chosen.sum(1, keepdim=True))
    else:
        survive = chosen * kept
        assert_close(weight, survive / survive.sum(1, keepdim=True).clamp_min(1e-30))


def test_weights_stay_finite_where_the_taking_experts_have_no_probability() -> None:
    """Softmax gives exactly 0 to scores 300 below the best, and an overflowing token may end at two of these."""
    router = TopKRouter(
        4, 4, 2, capacity=Capacity(train=0.5, minimum=1), overflow=NoTokenLeftBehind(), renormalise="before_drop"
    )
    with torch.no_grad():
        router.weight.zero_()[:, 0] = torch.tensor([300.0, 290.0, 0.0, -10.0])
    x = torch.zeros(8, 4)
    x[:, 0] = 1.0
    routing = router(x)
    nowhere = (routing.expert >= 2) & routing.kept
    assert int(nowhere.sum()) == 4
    assert routing.weight[nowhere].tolist() == [0.0] * 4
    for found in (routing, router.imposed(x, None, routing)):
        assert bool(found.weight.isfinite().all())
        (gradient,) = torch.autograd.grad(found.weight.sum(), router.weight)
        assert bool(gradient.isfinite().all())


def test_a_causal_decoder_refuses_it_where_there_is_a_capacity() -> None:
    with pytest.raises(ValueError, match="depend on later tokens"):
        router_of(1, 1.0, None).check_causal()
    TopKRouter(D, E, overflow=NoTokenLeftBehind()).check_causal()
    router_of(1, 1.0, None, allow_future=True).check_causal()


def test_rounds_are_checked() -> None:
    with pytest.raises(ValueError, match=r"NoTokenLeftBehind\.rounds must be at least 1, or None .*: got 0"):
        NoTokenLeftBehind(0)
