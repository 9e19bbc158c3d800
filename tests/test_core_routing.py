"""The vocabulary: capacity, contexts, statistics, pytrees."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils import _pytree

import moekit as mk
from moekit.routing import Capacity, Routing, RoutingContext, routing_stats
from moekit.testing import random_routing

T, E = 30, 4


@pytest.mark.parametrize(
    ("capacity", "tokens", "experts", "k", "slots"),
    [
        (Capacity(train=1.0), 100, 8, 1, 13),  # ceil(12.5)
        (Capacity(train=1.0, rounding="floor"), 100, 8, 1, 12),
        (Capacity(train=1.0, rounding="nearest"), 108, 8, 1, 14),  # 13.5: the even neighbour
        (Capacity(train=1.0, rounding="nearest"), 100, 8, 1, 12),  # 12.5: the even neighbour
        (Capacity(train=1.25), 100, 10, 2, 25),
        (Capacity(train=1.25, share="tokens"), 100, 10, 2, 13),  # ceil(12.5), whatever k is
        (Capacity(train=1.25, share="tokens"), 100, 10, 1, 13),
        (Capacity(train=1.1), 100, 10, 1, 11),  # 11.000000000000002 in floating point is still 11
        (Capacity(train=1.0, rounding="floor"), 29 * 7, 7, 1, 29),
        (Capacity(train=0.1), 100, 10, 1, 4),  # the minimum
        (Capacity(train=0.1, minimum=1), 100, 10, 1, 1),
        (Capacity(train=9.0), 100, 4, 2, 100),  # no expert can get more than all tokens
        (Capacity(train=1.0), 2, 4, 1, 2),  # not even by the minimum
        (Capacity(train=1.0), 0, 4, 1, 0),
        (Capacity(eval=2.0), 100, 10, 1, None),
    ],
)
def test_slots(capacity: Capacity, tokens: int, experts: int, k: int, slots: int | None) -> None:
    assert capacity.slots(tokens, experts, k, training=True) == slots


def test_phases_have_their_own_factor() -> None:
    capacity = Capacity(train=1.0, eval=2.0)
    assert capacity.slots(100, 10, 1, training=True) == 10
    assert capacity.slots(100, 10, 1, training=False) == 20
    assert Capacity().slots(100, 10, 1, training=True) is None
    assert Capacity().slots(100, 10, 1, training=False) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0.0}, r"Capacity.train must be a positive factor or None \(dropless\): got 0.0"),
        ({"eval": -1.0}, r"Capacity.eval must be a positive factor"),
        ({"train": math.nan}, r"Capacity.train must be a positive factor"),
        ({"train": math.inf}, r"Capacity.train must be a positive factor"),
        ({"minimum": 0}, "Capacity.minimum must be at least 1: got 0"),
        ({"priority": "first"}, 'Capacity.priority must be "position", "probability" or "random": got \'first\''),
        ({"rounding": "up"}, 'Capacity.rounding must be "ceil", "floor" or "nearest": got \'up\''),
        ({"share": "experts"}, 'Capacity.share must be "choices" or "tokens": got \'experts\''),
    ],
)
def test_capacity_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capacity(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capacity", "looks_ahead"),
    [
        (Capacity(), False),
        (Capacity(train=1.0), False),
        (Capacity(train=1.0, priority="random"), True),
        (Capacity(eval=1.0, priority="random"), False),  # random acts in training only
        (Capacity(priority="random"), False),
        (Capacity(train=1.0, priority="probability"), True),
        (Capacity(eval=1.0, priority="probability"), True),
        (Capacity(priority="probability"), False),
    ],
)
def test_looking_ahead(capacity: Capacity, looks_ahead: bool) -> None:
    assert capacity.looks_ahead == looks_ahead


def test_context_flattens() -> None:
    ids = torch.arange(6).view(2, 3)
    context = RoutingContext(mask=ids < 4, token_ids=ids, position=ids.t().contiguous().t())
    flat = context.flatten(6)
    assert flat.mask is not None
    assert flat.mask.tolist() == [True] * 4 + [False] * 2
    assert flat.token_ids is not None
    assert flat.token_ids.tolist() == list(range(6))
    assert flat.position is not None
    assert flat.position.tolist() == list(range(6))
    assert (flat.previous_ids, flat.task, flat.sequence) == (None, None, None)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RoutingContext)])
def test_context_must_fit(field: str) -> None:
    wrong = torch.zeros(2, 3, dtype=torch.bool if field == "mask" else torch.int64)
    message = rf"RoutingContext.{field} must have one entry per token: got shape \(2, 3\) for 5 tokens"
    with pytest.raises(ValueError, match=message):
        RoutingContext(**{field: wrong}).flatten(5)


def test_mask_must_be_bool() -> None:
    with pytest.raises(ValueError, match=r"mask must be Bool, True for a real token: got torch.int64. Write mask.bool"):
        RoutingContext(mask=torch.ones(4, dtype=torch.int64)).flatten(4)


def test_routing_stats_count() -> None:
    """By expert and by group against a loop; padding counts nowhere, whatever its group id is."""
    routing = random_routing(T, E, 2, capacity=9)
    padded = routing.token % 5 == 0
    routing = dataclasses.replace(
        routing, position=torch.where(padded, -1, routing.position), kept=routing.kept & ~padded
    )
    group = torch.arange(T) % 3
    group[torch.arange(T) % 5 == 0] = -100
    load, kept, by_group = [0] * E, [0] * E, [[0] * E for _ in range(3)]
    for n in range(2 * T):
        e, t = int(routing.expert[n]), int(routing.token[n])
        if t % 5:
            load[e] += 1
            kept[e] += bool(routing.kept[n])
            by_group[int(group[t])][e] += 1
    assert sum(kept) < sum(load) < 2 * T
    stats = routing_stats(routing, group.view(5, 6), 3)
    assert stats.load.tolist() == load
    assert stats.kept.tolist() == kept
    assert stats.load_by_group is not None
    assert stats.load_by_group.tolist() == by_group
    assert routing_stats(routing).load_by_group is None


def test_routing_stats_refuse() -> None:
    routing = random_routing(T, E)
    with pytest.raises(ValueError, match="one id for each of 30 tokens and num_groups of at least 1: got 30 ids and"):
        routing_stats(routing, torch.zeros(T, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 29 ids and num_groups=2"):
        routing_stats(routing, torch.zeros(T - 1, dtype=torch.int64), 2)


def test_everything_is_a_pytree() -> None:
    """Tensors are leaves, sizes travel along, and what comes back is the same type."""
    router = mk.routers.switch(6, E).train()
    layer = mk.MoELayer(router, mk.experts.GroupedMLP(E, 6, 4))
    context = RoutingContext(mask=torch.ones(T, dtype=torch.bool))
    out = layer(torch.randn(T, 6), context)
    stats = routing_stats(out.routing)
    for value, count in ((context, 1), (out.routing, 5 + 2 + 2), (out, 1 + 5 + 2 + 2), (stats, 2)):
        leaves, spec = _pytree.tree_flatten(value)
        assert len([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]) == count
        back = _pytree.tree_unflatten(leaves, spec)
        assert type(back) is type(value)
        for field in dataclasses.fields(value):
            assert getattr(back, field.name) is getattr(value, field.name) or field.name in (
                "losses",
                "statistics",
                "deviations",
                "routing",
            )
    doubled = _pytree.tree_map_only(torch.Tensor, lambda t: t.clone(), out)
    assert (doubled.routing.num_tokens, doubled.routing.num_experts) == (T, E)
    assert doubled.routing.capacity == out.routing.capacity
    assert doubled.routing.losses.keys() == {"load_balance", "router_z"}


def test_frozen() -> None:
    routing = random_routing(T, E)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.kept = routing.kept  # type: ignore[misc]


def test_a_router_must_implement_forward() -> None:
    class Nothing(mk.Router):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()


def test_queued() -> None:
    routing = Routing(
        token=torch.tensor([0, 0, 1]),
        expert=torch.tensor([0, 1, 0]),
        weight=torch.ones(3),
        position=torch.tensor([0, -1, 1]),
        kept=torch.tensor([True, False, False]),
    )
    assert routing.queued.tolist() == [True, False, True]
