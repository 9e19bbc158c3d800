"""Load observed on several processes moves state in all of them as one process that saw everything would."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moekit.experts import GroupedMLP
from moekit.functional import load_balance
from moekit.layer import MoELayer
from moekit.routers import Balance, LossFreeRouter, ReLURouter, TopKRouter
from moekit.routers.load_window import LoadWindow
from moekit.testing import assert_close, run_distributed, seeded, skewed_tokens

D, E, TOKENS = 6, 4, 9
RATE = 0.1


def micro_batch(number: int) -> Tensor:
    return skewed_tokens(TOKENS + number % 2, D, seed=number)


def spread(router: LossFreeRouter | ReLURouter | TopKRouter) -> None:
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(2)))
    router.train()


def loss_free_bias(steps: list[list[int]]) -> Tensor:
    """The bias after steps that saw these micro-batches here."""
    router = LossFreeRouter(D, E, 2, update_rate=RATE)
    spread(router)
    for number, step in enumerate(steps, start=1):
        for batch in step:
            router.observe(router(micro_batch(batch)))
        router.on_step_end(number)
    return router.bias


def relu_exponent(steps: list[list[int]], target_k: float) -> Tensor:
    router = ReLURouter(D, E, target_k)
    spread(router)
    for number, step in enumerate(steps, start=1):
        for batch in step:
            router.observe(router(micro_batch(batch)))
        router.coefficient.on_step_end(number)
    return router.coefficient.exponent


def global_balance(step: list[int]) -> list[Tensor]:
    """The loss of each micro-batch of a step, and its gradient."""
    router = TopKRouter(D, E, 2, balance=Balance(count="all", scope="global"))
    spread(router)
    found = []
    for batch in step:
        routing = router(micro_batch(batch))
        loss = routing.losses["load_balance"]
        found += [loss.detach(), torch.autograd.grad(loss, router.weight)[0]]
        router.observe(routing)
    return found


def wrapped_bias(steps: list[list[int]]) -> Tensor:
    """The same as `loss_free_bias` inside DistributedDataParallel, which broadcasts buffers before every forward."""
    router = LossFreeRouter(D, E, 2, update_rate=RATE)
    spread(router)
    with seeded(0):
        layer = MoELayer(router, GroupedMLP(E, D, 4))
    wrapped = DistributedDataParallel(layer)
    for number, step in enumerate(steps, start=1):
        for batch in step:
            hidden, routing = wrapped(micro_batch(batch))
            hidden.sum().backward()
            router.observe(routing)
        router.on_step_end(number)
    return router.bias


def evaluated_alone() -> float:
    """The loss in evaluation: ranks need not have the same number of batches, so nothing may wait for another."""
    router = TopKRouter(D, E, 2, balance=Balance(count="all", scope="global"))
    spread(router)
    router.eval()
    router.observe(router(micro_batch(1)))  # an open window, as when validation runs inside a step
    return float(router(micro_batch(0)).losses["load_balance"].detach())


def on_two_ranks() -> dict[str, object]:
    rank = dist.get_rank()
    # In the third step the second rank sees nothing, and must take part all the same.
    mine = [[[0, 1], [2, 3], [8]], [[4, 5], [6, 7], []]][rank]
    return {
        "bias": loss_free_bias(mine),
        "wrapped": wrapped_bias(mine[:2]),
        "exponent": relu_exponent(mine, 1.0),
        "dense": relu_exponent(mine, 3.5),
        "balance": global_balance(mine[0]),
        "evaluated": evaluated_alone() if rank == 0 else 0.0,
    }


def test_two_ranks_equal_one_process() -> None:
    found = run_distributed(on_two_ranks, 2)
    together = [[0, 1, 4, 5], [2, 3, 6, 7], [8]]
    bias = loss_free_bias(together)
    assert not torch.equal(bias, loss_free_bias([[0, 1], [2, 3], [8]]))  # a rank alone would move elsewhere
    for rank, result in enumerate(found):
        assert torch.equal(result["bias"], bias), f"rank {rank}"
        assert torch.equal(result["wrapped"], loss_free_bias(together[:2])), f"rank {rank} in DistributedDataParallel"
        assert torch.equal(result["exponent"], relu_exponent(together, 1.0))
        assert torch.equal(result["dense"], relu_exponent(together, 3.5))
    assert int(found[0]["exponent"]) > 0 > int(found[0]["dense"])

    batch = TopKRouter(D, E, 2, balance=Balance(count="all"))
    spread(batch)
    expected = float(batch.eval()(micro_batch(0)).losses["load_balance"].detach())
    assert found[0]["evaluated"] == pytest.approx(expected)

    # The last micro-batch of a step has seen all of them, whether one after the other or side by side.
    for rank, order in enumerate(([0, 4, 5, 1], [0, 4, 1, 5])):
        alone = global_balance(order)
        for which, name in ((-2, "loss"), (-1, "gradient")):
            assert_close(found[rank]["balance"][which], alone[which], f"{name} of the last micro-batch, rank {rank}")
    # The first has seen the first of each rank.
    first = global_balance([4, 0])
    assert_close(found[0]["balance"][0], first[2], "loss of the first micro-batch")
    assert abs(float(found[0]["balance"][0]) - float(global_balance([0])[0])) > 1e-3


def test_window() -> None:
    window = LoadWindow(3)
    assert window.summed(torch.device("cpu")).tolist() == [0, 0, 0]
    counts = torch.tensor([1, 2, 3])
    window.add(counts)
    window.add(torch.tensor([1, 0, 1]))
    assert window.summed(torch.device("cpu")).tolist() == [2, 2, 4]
    assert counts.tolist() == [1, 2, 3]  # what was given belongs to the giver
    window.clear()
    assert window.counts is None


def test_earlier_counts_are_for_the_global_scope() -> None:
    probs = torch.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="for scope \"global\" only: got 'batch'"):
        load_balance(probs, torch.zeros(4, 1, dtype=torch.int64), earlier=torch.ones(2, dtype=torch.int64))
