"""Local groups inside one process: each group is routed as Algorithm 1's loop routes it alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from paper_loops import gshard_loop

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.functional.reference import moe_reference
from moekit.recipes.gshard import RECIPE, build
from moekit.routers import Balance, LossFreeRouter, SparseMixerRouter, TopKRouter
from moekit.routing import Capacity, RoutingContext
from moekit.runs import RunText
from moekit.testing import assert_close, skewed_tokens

T, D, E, SIZE = 40, 6, 5, 16  # two whole groups and half a one
CASES = list(itertools.product([0, 1, 2], [0.6, 1.0], [False, True]))  # seed, capacity factor, with padding


@pytest.mark.parametrize(("seed", "factor", "padded"), CASES)
def test_every_group_as_algorithm_1(seed: int, factor: float, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is kept, weights, the mean of the groups' losses, and gradients (arXiv:2006.16668 section 2.2)."""
    router = routers.gshard(D, E, capacity_factor=factor, group_size=SIZE).double().train()
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(seed)))
    x = (skewed_tokens(T, D, dtype=torch.float64, seed=seed) / 2).requires_grad_()
    mask = torch.arange(T) % 5 != 3 if padded else torch.ones(T, dtype=torch.bool)
    uniform = torch.rand(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda weight: uniform[:, None].to(weight.dtype))
    routing = router(x, RoutingContext(mask=mask))

    values = torch.cos(torch.arange(T * E, dtype=torch.float64)).view(T, E)
    starts = range(0, T, SIZE)
    dropped, output, balance = 0, torch.zeros(()), torch.zeros(())
    for start in starts:
        here = slice(start, min(start + SIZE, T))
        length = here.stop - start
        real = set(mask[here].nonzero().flatten().tolist())
        loop = gshard_loop(x[here], router.weight, factor, range(length), real, uniform[here])
        for (s, choice), expert in loop.expert.items():
            n = choice * T + start + s
            assert int(routing.expert[n]) == expert
            assert bool(routing.kept[n]) == loop.kept[s, choice], f"token {s} of the group at {start}, choice {choice}"
            assert bool(routing.queued[n]) == (loop.place[s, choice] >= 0)
            assert_close(routing.weight[n], loop.weight[s, choice], "weight")
            dropped += loop.place[s, choice] >= 0 and not loop.kept[s, choice]
        output = output + loop.output(values[here])
        balance = balance + loop.balance / len(starts)
    assert dropped > 0 or factor == 1.0, "the case tests nothing"
    found = (routing.weight * routing.kept * values[routing.token, routing.expert]).sum()
    loss = routing.losses["load_balance"] / E**2
    assert_close(found, output, "weighted sum")
    assert_close(loss, balance, "balance loss")
    leaves = (x, router.weight)
    pairs = zip(torch.autograd.grad(found + loss, leaves), torch.autograd.grad(output + balance, leaves), strict=True)
    for a, b in pairs:
        assert_close(a, b, "gradient")


@pytest.mark.parametrize("priority", ["position", "probability", "random"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_group_is_served_as_if_it_were_alone(k: int, priority: str) -> None:
    """Whatever the order of service; the layer, padded over all groups, equals the loop over assignments."""
    capacity = Capacity(train=0.5, eval=0.5, minimum=1, priority=priority, group_size=SIZE)  # type: ignore[arg-type]
    router = TopKRouter(D, E, k, capacity=capacity, init_scale=4.0)
    layer = MoELayer(router, GroupedMLP(E, D, 12)).eval()
    x = skewed_tokens(T, D, seed=1)
    routing = router(x)
    kept = routing.kept.view(k, T)
    for start in range(0, T, SIZE):
        alone = router(x[start : start + SIZE])
        assert torch.equal(alone.kept.view(k, -1), kept[:, start : start + SIZE])
    assert 0 < int(routing.kept.sum()) < routing.kept.numel()
    assert routing.capacity == capacity.slots(T, E, k, training=False) == 2 * {1: 2, 2: 4}[k] + {1: 1, 2: 2}[k]
    assert_close(layer(x).hidden, moe_reference(x, routing, layer.experts.reference))
    assert_close(router(x[:SIZE]).weight, TopKRouter.forward(router, x[:SIZE]).weight)


def test_one_group_is_the_whole_batch() -> None:
    x = skewed_tokens(T, D, seed=2)
    torch.manual_seed(0)
    apart = routers.gshard(D, E, group_size=T).eval()
    torch.manual_seed(0)
    whole = routers.gshard(D, E).eval()
    assert_close(apart(x).losses["load_balance"], whole(x).losses["load_balance"])
    assert Capacity(train=1.0, group_size=T).slots(T, E, 2, training=True) == 16
    assert Capacity(train=1.0, group_size=SIZE).slots(T, E, 2, training=True) == 7 + 7 + 4
    assert Capacity(train=1.0, group_size=SIZE).slots(T, E, 2, training=False) is None


@pytest.mark.parametrize("kind", ["top-k", "loss-free", "loss-free, unbiased", "sparse mixer"])
def test_every_router_with_a_balance_loss_counts_groups_apart(kind: str) -> None:
    """The mean of the groups' losses, each as that of a batch of its own."""
    balance, capacity = Balance(count="all", scope="group"), Capacity(train=2.0, group_size=SIZE)
    options: dict[str, Any] = {"balance": balance, "capacity": capacity, "init_scale": 5.0}
    torch.manual_seed(0)
    router = {
        "top-k": lambda: TopKRouter(D, E, 2, **options),
        "loss-free": lambda: LossFreeRouter(D, E, 2, **options),
        "loss-free, unbiased": lambda: LossFreeRouter(D, E, 2, balance_choices="unbiased", **options),
        "sparse mixer": lambda: SparseMixerRouter(D, E, 2, tolerance=0.0, **options),  # 0: nothing is drawn
    }[kind]()
    x = skewed_tokens(T, D, seed=3)
    alone = [router(group).losses["load_balance"] for group in x.split(SIZE)]
    found = router(x).losses["load_balance"]
    assert_close(found, torch.stack(alone).mean())
    router.balance = Balance(count="all", scope="batch")
    assert abs(float((router(x).losses["load_balance"] - found).detach())) > 1e-3


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size must be at least 1, or None for one group: got 0"):
        Capacity(train=1.0, group_size=0)
    with pytest.raises(ValueError, match="Leave one of them out"):
        TopKRouter(D, E, capacity=Capacity(train=1.0, group_size=8), overflow=routers.NoTokenLeftBehind())
    with pytest.raises(ValueError, match="scope must be one of batch, sequence, group, global"):
        Balance(scope="groups")  # type: ignore[arg-type]


def test_the_recipe_sets_it() -> None:
    config = RECIPE.variants["tiny"].config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, group_size=64))  # type: ignore[attr-defined]
    found = [m for m in build(config, RunText(100)).backbone.modules() if isinstance(m, TopKRouter)]  # type: ignore[arg-type]
    assert found
    assert all(m.capacity.group_size == 64 and m.balance.scope == "group" for m in found)  # type: ignore[union-attr]
    assert RECIPE.name == "gshard"
