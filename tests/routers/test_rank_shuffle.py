"""The shuffle of assignment problems over ranks, on two and three processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moekit.kernels import balanced_assignment
from moekit.routers import BASELayerRouter, RankShuffle, base_layers
from moekit.routing import RoutingContext, routing_stats
from moekit.testing import run_distributed, skewed_tokens, some_mask

D, E = 6, 4


def scores_of(rank: int, n: int) -> Tensor:
    return torch.randn(n, E, generator=torch.Generator().manual_seed(100 + rank))


def there_and_back(sizes: list[int]) -> dict[str, Any]:
    """Greedy choices are the same wherever they are made: this shows that every answer finds its token."""
    rank = dist.get_rank()
    scores, shuffle = scores_of(rank, sizes[rank]), RankShuffle()
    seen: list[Tensor] = []

    def greedy(arrived: Tensor) -> Tensor:
        seen.append(arrived)
        return arrived.argmax(1)

    found = shuffle.assign(scores, greedy)
    (arrived,) = seen
    own = (arrived[:, None] == scores[None]).all(-1).any(1) if len(scores) else torch.zeros(len(arrived), dtype=bool)
    return {"right": torch.equal(found, scores.argmax(1)), "arrived": len(arrived), "own": int(own.sum())}


def in_a_router(group_of: list[int] | None) -> dict[str, Any]:
    """Everything about a BASELayerRouter with a shuffle; ranks hold different numbers of tokens."""
    rank = dist.get_rank()
    group = None if group_of is None else dist.new_group(group_of)
    if group_of is not None and rank not in group_of:
        return {}
    torch.manual_seed(7)  # the same centroids everywhere
    router = BASELayerRouter(D, E, init_gain=1.0, shuffle=RankShuffle(group)).train()
    n = (40, 26, 35)[rank]
    x, context = skewed_tokens(n, D, seed=rank), RoutingContext(mask=some_mask(n))

    def route() -> Any:
        torch.manual_seed(50 + rank)
        return router(x, context)

    routing, again = route(), route()
    assert torch.equal(routing.expert, again.expert)
    torch.manual_seed(99 + rank)
    other = router(x, context)
    assert routing.capacity is None
    assert torch.equal(routing.kept, context.mask)
    # Recomputation makes the same exchange again and gives the same gradients.
    plain = torch.autograd.grad(route().weight.sum(), router.weight)[0]
    torch.manual_seed(50 + rank)
    recomputed = checkpoint(lambda x: router(x, context).weight.sum(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(recomputed, router.weight)[0], plain)
    # Evaluation exchanges nothing, greedy or balanced: one rank alone may do it.
    if rank == 0:
        router.eval()
        scores = x @ router.weight.detach().t()
        assert torch.equal(router(x, context).expert[context.mask], scores.argmax(1)[context.mask])
        router.eval_assignment = "balanced"
        alone = balanced_assignment(scores, context.mask)
        assert torch.equal(router(x, context).expert[context.mask], alone[context.mask])
    return {
        "load": routing_stats(routing).load,
        "real": int(context.mask.sum()),
        "changes": not torch.equal(routing.expert, other.expert),
    }


def better_mixed() -> list[float]:
    """Each rank's tokens all like one expert, another on each rank: only mixed problems can give them that."""
    rank = dist.get_rank()
    x = torch.zeros(64, 2)
    x[:, rank] = 1.0
    router = BASELayerRouter(2, 2).train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    router.shuffle = None
    alone = router(x).statistics["greedy_agreement"]
    router.shuffle = RankShuffle()
    return [float(alone), float(router(x).statistics["greedy_agreement"])]


def two_ranks() -> dict[str, Any]:
    return {
        "even": there_and_back([12, 12]),
        "uneven": there_and_back([7, 2]),
        "one empty": there_and_back([5, 0]),
        "empty": there_and_back([0, 0]),
        "router": in_a_router(None),
        "mixed": better_mixed(),
    }


def three_ranks() -> dict[str, Any]:
    """The whole world, and a group of two beside one that takes no part."""
    return {
        "uneven": there_and_back([11, 1, 6]),
        "router": in_a_router(None),
        "group": in_a_router([0, 2]),
    }


def test_two_ranks() -> None:
    first, second = run_distributed(two_ranks, 2)
    for name in ("even", "uneven", "one empty", "empty"):
        assert first[name]["right"]
        assert second[name]["right"]
    assert (first["even"]["arrived"], second["even"]["arrived"]) == (12, 12)
    assert first["even"]["own"] == 6
    assert first["uneven"]["arrived"] + second["uneven"]["arrived"] == 9
    assert first["empty"]["arrived"] == 0
    assert first["router"]["changes"]
    # Each of two problems is balanced up to one, so both together are up to two.
    load = first["router"]["load"] + second["router"]["load"]
    assert int(load.sum()) == first["router"]["real"] + second["router"]["real"]
    assert int(load.max() - load.min()) <= 2
    # One rank's own load is what its tokens like, not an even one.
    assert int((first["router"]["load"].max() - first["router"]["load"].min()).abs()) > 2
    for alone, mixed in (first["mixed"], second["mixed"]):
        assert alone == 0.5
        assert mixed > 0.8


def test_three_ranks_and_a_group_of_two() -> None:
    ranks = run_distributed(three_ranks, 3)
    assert all(rank["uneven"]["right"] for rank in ranks)
    assert sum(rank["uneven"]["arrived"] for rank in ranks) == 18
    load = sum(rank["router"]["load"] for rank in ranks)
    assert int(load.max() - load.min()) <= 3
    assert ranks[1]["group"] == {}
    load = ranks[0]["group"]["load"] + ranks[2]["group"]["load"]
    assert int(load.max() - load.min()) <= 2
    assert int(load.sum()) == ranks[0]["group"]["real"] + ranks[2]["group"]["real"]


def test_alone_it_does_nothing() -> None:
    """Without torch.distributed: no draw, the same routing and capacity as without a shuffle."""
    torch.manual_seed(0)
    with_shuffle = base_layers(D, E, shuffle=RankShuffle()).train()
    without = BASELayerRouter(D, E).train()
    without.load_state_dict(with_shuffle.state_dict())
    x, context = skewed_tokens(30, D), RoutingContext(mask=some_mask(30))
    state = torch.get_rng_state()
    ours, plain = with_shuffle(x, context), without(x, context)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(ours.expert[context.mask], plain.expert[context.mask])
    assert ours.capacity == plain.capacity
    scores = scores_of(0, 9)
    assert torch.equal(RankShuffle().assign(scores, balanced_assignment), balanced_assignment(scores))


class Group:
    """Stands for a process group."""


def test_copies_share_the_group_and_pickle_refuses_it() -> None:
    group: Any = Group()
    shuffle = RankShuffle(group)
    assert copy.deepcopy(shuffle).group is group
    assert pickle.loads(pickle.dumps(RankShuffle())).group is None
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(shuffle)
    assert repr(shuffle) == "RankShuffle(group)"
    assert repr(RankShuffle()) == "RankShuffle()"
