"""GShard's Algorithm 1 and Switch's pseudo-code to the letter, and exactly how the routers here differ from them.

`test_paper_algorithms` compares with the algorithms as moekit means them. Here nothing is repaired: the tests assert
the differences that the docstrings name, and that there are no others.
"""

from __future__ import annotations

import math

import pytest
import torch
from paper_loops import best, softmax
from torch import Tensor

from moekit import routers
from moekit.functional.random_bits import jitter
from moekit.routing import Capacity, Router, Routing
from moekit.testing import assert_close, seeded, skewed_tokens

T, D, E = 40, 6, 5
Gates = dict[tuple[int, int], Tensor]  # the combine weight of every (token, expert) that got a place


def prepared(router: Router, seed: int) -> tuple[Tensor, Tensor]:
    """Crowded tokens and the router's weights, spread out, in float64; the router trains."""
    router.double().train()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(seed)))  # type: ignore[operator, union-attr]
    return skewed_tokens(T, D, dtype=torch.float64, seed=seed) / 2, router.weight  # type: ignore[return-value]


def gates_of(routing: Routing) -> Gates:
    kept = routing.kept.nonzero().flatten().tolist()
    return {(int(routing.token[n]), int(routing.expert[n])): routing.weight[n] for n in kept}


def assert_equal(found: Gates, expected: Gates) -> None:
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert_close(found[key], weight, f"gate of {key}")


def algorithm_1(x: Tensor, router: Tensor, uniform: Tensor) -> tuple[Gates, Tensor]:
    """arXiv:2006.16668 Algorithm 1 for one group: the gates and the auxiliary loss."""
    capacity = math.ceil(2 * T / E)
    gates: Gates = {}
    counter = [0] * E
    probs = [softmax(x[s], router) for s in range(T)]
    for s in range(T):
        first, second = best(probs[s], 2)
        weight = probs[s][first] / (probs[s][first] + probs[s][second])
        place = counter[first]
        if place < capacity:
            gates[s, first] = weight
        counter[first] = place + 1
    mean = torch.stack(probs).mean(0)
    loss = sum((counter[e] / T * mean[e] for e in range(E)), torch.zeros(())) / E
    for s in range(T):
        first, second = best(probs[s], 2)
        weight = probs[s][second] / (probs[s][first] + probs[s][second])
        place = counter[second]
        if place < capacity and 2 * weight.item() > uniform[s].item():
            gates[s, second] = weight
        counter[second] = place + 1
    return gates, loss


@pytest.mark.parametrize("seed", range(4))
def test_gshard_algorithm_1(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differs: the loss is E**2 times larger, and a second choice that is not sent takes no place, so more arrive."""
    router = routers.gshard(D, E)
    x, weight = prepared(router, seed)
    uniform = torch.rand(T, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda _: uniform)
    found, (expected, loss) = router(x), algorithm_1(x, weight, uniform[:, 0])
    assert_close(found.losses["load_balance"], loss * E**2)
    gates = gates_of(found)
    assert gates.keys() >= expected.keys()
    assert_equal({key: gates[key] for key in expected}, expected)
    extra = gates.keys() - expected.keys()
    chosen = {s: best(softmax(x[s], weight), 2) for s in range(T)}
    assert all(chosen[s][1] == e for s, e in extra), "only second choices may gain from it"


def test_the_slots_that_algorithm_1_wastes_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference that the test above allows is there: without it `>=` could be `==`."""
    gained = 0
    for seed in range(4):
        router = routers.gshard(D, E)
        x, weight = prepared(router, seed)
        uniform = torch.rand(T, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        monkeypatch.setattr(torch, "rand_like", lambda _, draws=uniform: draws)
        gained += int(router(x).kept.sum()) - len(algorithm_1(x, weight, uniform[:, 0])[0])
    assert gained > 0


@pytest.mark.parametrize("seed", range(4))
def test_gshard_where_every_second_choice_is_sent(seed: int) -> None:
    """Then no slot is wasted, and the gates are those of Algorithm 1 without exception."""
    router = routers.TopKRouter(D, E, 2, capacity=Capacity(train=1.0), renormalise="before_drop")
    x, weight = prepared(router, seed)
    assert_equal(gates_of(router(x)), algorithm_1(x, weight, torch.full((T,), -1.0))[0])


def switch_pseudocode(x: Tensor, router: Tensor, factor: float, noise: Tensor | None) -> tuple[Gates, Tensor]:
    """arXiv:2101.03961 appendix F: noise is added to logits, the cumulative sum counts the token itself."""
    capacity = int(factor * T / E)
    gates: Gates = {}
    position = [0] * E
    probs = []
    for s in range(T):
        logits = torch.stack([(x[s] * row).sum() for row in router])
        probs.append((logits if noise is None else logits + noise[s]).softmax(-1))
        (expert,) = best(probs[s], 1)
        position[expert] += 1
        if position[expert] < capacity:
            gates[s, expert] = probs[s][expert]
    density, proxy = torch.tensor(position) / T, torch.stack(probs).mean(0)
    return gates, (density * proxy).mean() * E**2


@pytest.mark.parametrize("seed", range(4))
def test_switch_pseudocode(seed: int) -> None:
    """Differs: its inclusive sum with "<" leaves one slot of each expert empty; one slot less here is the same."""
    router = routers.switch(D, E, capacity_factor=1.0, jitter=0.0)
    x, weight = prepared(router, seed)
    expected, loss = switch_pseudocode(x, weight, 1.0, None)
    found = router(x)
    assert_close(found.losses["load_balance"].float(), loss.float())
    full = torch.bincount(found.expert, minlength=E) >= T // E
    assert int(found.kept.sum()) - len(expected) == int(full.sum()) > 0
    smaller = routers.TopKRouter(D, E, capacity=Capacity(train=1.0 - E / T)).double().train()
    smaller.load_state_dict(router.state_dict())
    assert smaller(x).capacity == T // E - 1
    assert_equal(gates_of(smaller(x)), expected)


def test_switch_noise_of_the_pseudocode_is_another() -> None:
    """Added to logits it shifts all by about 1, which a softmax ignores; on the input it grows with the input."""
    router = routers.switch(D, E, capacity_factor=None, jitter=0.1)
    x, weight = prepared(router, 0)
    clean = (x @ weight.t()).softmax(-1)
    noise = torch.empty(T, E, dtype=torch.float64).uniform_(0.9, 1.1)
    added = {s: gate for (s, _), gate in switch_pseudocode(x, weight, 99.0, noise)[0].items()}
    with seeded(0):
        ours = router(x).weight
    with seeded(0):
        jittered = jitter(x, 0.1)
    assert_close(ours, (jittered @ weight.t()).softmax(-1).amax(-1))
    off = [float((added[s] / clean[s].amax() - 1).detach().abs()) for s in range(T)]
    assert max(off) < 0.25
    assert not torch.allclose(ours, torch.stack([added[s] for s in range(T)]))
