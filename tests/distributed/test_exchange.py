"""Rows between ranks: the dispatchers over an exchange against the local ones, one level and two."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_lm import SmallLM, differences, fit, one_process, quiet, sentences
from torch import Tensor

from moekit import ExpertParallelStrategy
from moekit.dispatch import AllToAll, Exchange, PackedDispatcher, PaddedDispatcher, TwoLevelAllToAll
from moekit.dispatch.exchange import transpose_blocks
from moekit.experts import GroupedMLP
from moekit.parallel import ShardingPlan
from moekit.routing import Routing
from moekit.testing import assert_close, random_routing, run_distributed, seeded

E, D = 8, 5


def bank(first: int, count: int) -> GroupedMLP:
    """Experts `first` to ``first + count`` of one bank of E."""
    with seeded(0):
        whole = GroupedMLP(E, D, 6, bias=True, activation="silu").double()
    part = GroupedMLP(count, D, 6, bias=True, activation="silu").double()
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(whole.get_parameter(name)[first : first + count])
    return part


def cases(rank: int) -> list[tuple[str, int, Routing]]:
    """Batches of unequal sizes, empty ones, routings that leave ranks and experts without rows."""
    found = []
    for name, tokens, capacity in (
        ("equal", 7, 4),
        ("uneven", 3 + 4 * rank, 3),
        ("one rank has nothing", 0 if rank == 1 else 5, 2),
        ("nobody has anything", 0, 2),
    ):
        found.append((name, tokens, random_routing(tokens, E, 2, capacity=capacity, dtype=torch.float64, seed=rank)))
    dropless = random_routing(6 + rank, E, 3, dtype=torch.float64, seed=9 + rank)
    found.append(("dropless", 6 + rank, dropless))
    one = random_routing(5, E, 1, capacity=5, dtype=torch.float64, seed=rank)
    place = torch.arange(5)
    everything = {"expert": torch.full((5,), E - 1), "position": place, "kept": place < 5}
    found.append(("all to the last expert", 5, dataclasses.replace(one, **everything)))
    nothing = {"position": torch.full((5,), -1), "kept": torch.zeros(5, dtype=torch.bool)}
    found.append(("nothing kept", 5, dataclasses.replace(one, **nothing)))
    return found


def compare(exchange: Exchange) -> None:
    """Output, and gradients of tokens, weights and experts, against local dispatch with all experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    local, mine = bank(0, E), bank(rank * E // size, E // size)
    for kind in (PackedDispatcher, PaddedDispatcher):
        for name, tokens, routing in cases(rank):
            if kind is PaddedDispatcher and routing.capacity is None:
                continue
            results = []
            for dispatcher, experts in ((kind(), local), (kind().across(exchange), mine)):
                experts.zero_grad()
                x = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
                x.requires_grad_()
                weight = routing.weight.clone().requires_grad_()
                weighed = dataclasses.replace(routing, weight=weight)
                sent = dispatcher.dispatch(x, weighed)
                out = dispatcher.combine(experts(sent.rows, sent.counts), weighed, sent.handle)
                (out * torch.arange(out.numel(), dtype=torch.float64).cos().view_as(out)).sum().backward()
                results.append((out.detach(), x.grad, weight.grad))
            what = f"{type(exchange).__name__}, {kind.__name__}, {name}"
            for a, b in zip(*results, strict=True):
                assert_close(b if b is not None else torch.zeros(()), a if a is not None else torch.zeros(()), what)
            for parameter_name, parameter in mine.named_parameters():
                whole = local.get_parameter(parameter_name).grad
                assert whole is not None
                assert parameter.grad is not None, what
                dist.all_reduce(whole)
                first = rank * E // size
                assert_close(parameter.grad, whole[first : first + E // size], f"{what}: {parameter_name}")


def a_token_travels_once_to_a_rank(exchange: Exchange) -> None:
    """As many rows are sent as there are pairs of a token and a rank that has one of its experts."""
    size = dist.get_world_size()
    routing = random_routing(6, E, 3, capacity=3, dtype=torch.float64, seed=4)
    sent = PackedDispatcher(exchange).dispatch(torch.randn(6, D, dtype=torch.float64), routing)
    rank = routing.expert[routing.kept] // (E // size)
    pairs = set(zip(routing.token[routing.kept].tolist(), rank.tolist(), strict=True))
    assert sent.handle.route.rows == len(sent.handle.token) == len(pairs) < int(routing.kept.sum())


def one_level() -> None:
    compare(AllToAll(dist.group.WORLD))
    a_token_travels_once_to_a_rank(AllToAll(dist.group.WORLD))


def both_levels() -> None:
    """Four ranks as two nodes of two, and as nodes of one and of four."""
    rank = dist.get_rank()
    compare(AllToAll(dist.group.WORLD))
    for width in (2, 1, 4):
        inner = [dist.new_group(list(range(n, n + width))) for n in range(0, 4, width)][rank // width]
        outer = [dist.new_group(list(range(n, 4, width))) for n in range(width)][rank % width]
        compare(TwoLevelAllToAll(inner, outer))


def test_one_level() -> None:
    run_distributed(one_level, 2)


def test_two_levels() -> None:
    run_distributed(both_levels, 4)


@pytest.mark.parametrize(("a", "b"), [(3, 4), (1, 5), (4, 1)])
def test_transpose_blocks(a: int, b: int) -> None:
    sizes = torch.randint(0, 4, (a, b), generator=torch.Generator().manual_seed(a))
    blocks: Any = [[torch.full((int(sizes[i, j]), 2), 10.0 * i + j) for j in range(b)] for i in range(a)]
    rows = torch.cat([blocks[i][j] for i in range(a) for j in range(b)])
    expected: Tensor = torch.cat([blocks[i][j] for j in range(b) for i in range(a)])
    assert torch.equal(transpose_blocks(rows, sizes), expected)
    assert torch.equal(transpose_blocks(expected, sizes.t()), rows)


def two_levels_in_training(expected: dict[str, Any]) -> None:
    """Four ranks as two nodes of two, under the strategy."""
    with quiet():
        strategy = ExpertParallelStrategy(4, plan=ShardingPlan(node_size=2))
        module = SmallLM("sgd")
        found = differences(fit(module, strategy, sentences(2)), expected)
    layer = module.model.decoder.blocks[1].feed_forward
    assert isinstance(layer._packed.exchange, TwoLevelAllToAll)  # type: ignore[union-attr]
    assert max(found.values()) < 2e-6, found
    with pytest.raises(ValueError, match="node_size must divide expert_parallel_size: got 3 and 4"):
        fit(SmallLM("sgd"), ExpertParallelStrategy(4, plan=ShardingPlan(node_size=3)), sentences(2))


def test_two_levels_in_training() -> None:
    run_distributed(two_levels_in_training, 4, one_process(SmallLM("sgd"), sentences(2)))
