"""A capacity by sequence: beside a loop over sequences, and independent of what a sequence is batched with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import MoELayer, routers
from moekit.experts import GroupedMLP
from moekit.functional.reference import moe_reference
from moekit.routers import SequenceCapacity, TopKRouter
from moekit.routers.queueing import routing_of_choices
from moekit.routing import RoutingContext
from moekit.testing import assert_close, skewed_tokens

B, S, D, E = 3, 9, 8, 4


def context(mask: Tensor | None = None) -> RoutingContext:
    return RoutingContext(mask=mask, sequence=torch.arange(B)[:, None].expand(B, S)).flatten(B * S)


def router(k: int, limit: int) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(D, E, k, capacity=SequenceCapacity(limit), init_scale=4.0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_first_tokens_of_every_sequence(k: int, padded: bool, training: bool) -> None:
    mask = (torch.arange(S) < torch.tensor([9, 4, 7])[:, None]).flatten() if padded else None
    routing = router(k, 2).train(training)(skewed_tokens(B * S, D, seed=1), context(mask))
    seen: dict[tuple[int, int], int] = {}
    dropped = 0
    for token, expert, position, kept in zip(
        routing.token.tolist(), routing.expert.tolist(), routing.position.tolist(), routing.kept.tolist(), strict=True
    ):
        if mask is not None and not mask[token]:
            assert (position, kept) == (-1, False)
            continue
        queue = (token // S, expert)
        seen[queue] = seen.get(queue, 0) + 1
        assert kept == (seen[queue] <= 2)
        assert position >= 0
        dropped += not kept
    assert dropped > 0, "the limit bites"
    for e in range(E):
        places = routing.position[(routing.expert == e) & routing.kept]
        assert sorted(places.tolist()) == list(range(places.numel())), "dispatch relies on places without gaps"
    assert routing.capacity is None


def test_a_sequence_is_served_as_if_it_were_alone() -> None:
    layer = MoELayer(router(1, 2), GroupedMLP(E, D, 12)).eval()
    x = skewed_tokens(B * S, D, seed=1).view(B, S, D)
    together = layer(x, context())
    alone = [
        layer(row[None], RoutingContext(sequence=torch.zeros(1, S, dtype=torch.int64))).hidden for row in x.unbind()
    ]
    assert_close(together.hidden, torch.cat(alone))
    plain = moe_reference(x.flatten(0, 1), together.routing, layer.experts.reference)
    assert_close(together.hidden.flatten(0, 1), plain)


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1: got 0"):
        SequenceCapacity(0)
    with pytest.raises(ValueError, match=r"RoutingContext\.sequence is None"):
        router(1, 2)(torch.zeros(5, D))
    with pytest.raises(ValueError, match="Leave one of them out"):
        TopKRouter(D, E, capacity=SequenceCapacity(1), overflow=routers.NoTokenLeftBehind())
    assert not router(1, 2).looks_ahead
    assert (
        router(1, 2)(torch.zeros(0, D), RoutingContext(sequence=torch.zeros(0, dtype=torch.int64))).token.numel() == 0
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("LossFreeRouter", lambda own: routers.LossFreeRouter(D, E, 2, capacity=own)),
        ("SparseMixerRouter", lambda own: routers.SparseMixerRouter(D, E, 2, capacity=own)),
        ("SinkhornRouter", lambda own: routers.SinkhornRouter(D, E, 2, capacity=own)),
        ("NoisyTopKRouter", lambda own: routers.NoisyTopKRouter(D, E, 2, capacity=own)),
        ("UniformRouter", lambda own: routers.UniformRouter(E, 2, capacity=own)),
        ("TaskTableRouter", lambda own: routers.TaskTableRouter(E, [0, 1], capacity=own)),
        ("HashRouter", lambda own: routers.HashRouter(E, torch.zeros(5, dtype=torch.int64), capacity=own)),
        (
            "routing_of_choices",
            lambda own: routing_of_choices(torch.zeros(3, dtype=torch.int64), torch.ones(3), E, capacity=own),
        ),
    ],
)
def test_routers_that_would_ignore_it_refuse_it(name: str, make: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs a moekit\.Capacity.*got SequenceCapacity\(limit=1\)"):
        make(SequenceCapacity(1))
