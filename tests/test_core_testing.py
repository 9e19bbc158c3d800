"""The harness: closeness, processes, inputs."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.testing import (
    TOLERANCES,
    assert_close,
    assert_same,
    check_routing,
    random_routing,
    run_distributed,
    seeded,
    skewed_tokens,
    trace,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_close_is_relative_to_the_norm(dtype: torch.dtype, magnitude: float) -> None:
    """Three times the tolerance fails, a third of it passes, at any magnitude."""
    expected = torch.full((100,), magnitude, dtype=dtype)
    error = TOLERANCES[dtype] * float(expected.double().norm())
    for factor in (0.33, 3.0):
        actual = expected.clone()
        actual[3] += factor * error
        if factor < 1:
            assert_close(actual, expected)
        else:
            with pytest.raises(AssertionError, match=r"the gradient: \|\|actual - expected\|\| = .* where at most"):
                assert_close(actual, expected, "the gradient")


def test_the_coarser_type_decides() -> None:
    value = torch.full((10,), 1.001)
    assert_close(value.bfloat16(), value)
    assert_close(value, value.bfloat16())
    with pytest.raises(AssertionError):
        assert_close(value.bfloat16().double(), value)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_never_passes(value: float) -> None:
    bad, good = torch.tensor([1.0, value]), torch.tensor([1.0, 2.0])
    for pair in ((bad, good), (good, bad), (bad, bad)):
        with pytest.raises(AssertionError, match="holds NaN or infinity"):
            assert_close(*pair)


def test_shapes_and_whole_numbers_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"shape \(2,\) where \(2, 1\) is expected"):
        assert_close(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(AssertionError, match="1 of 3 entries differ"):
        assert_close(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))
    assert_close(torch.tensor([True]), torch.tensor([True]))


def test_zero_is_exact_unless_it_is_small_beside_others() -> None:
    noise, zero = torch.tensor([1e-9]), torch.zeros(1)
    assert_close(zero, zero)
    with pytest.raises(AssertionError):
        assert_close(noise, zero)
    large = torch.tensor([1.0])
    assert_same({"a": large, "b": noise}, {"a": large, "b": zero}, "set")
    with pytest.raises(AssertionError, match="set: b"):
        assert_same({"a": large, "b": 1e3 * noise}, {"a": large, "b": zero}, "set")
    with pytest.raises(AssertionError, match=r"results \['a'\] where \['a', 'b'\] are expected"):
        assert_same({"a": large}, {"a": large, "b": zero}, "set")


def test_seeds_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_are_skewed() -> None:
    """Under a random linear router some expert gets more than a third of the tokens and some gets few."""
    for seed in range(5):
        x = skewed_tokens(60, 8, seed=seed)
        expert = (x @ torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).argmax(1)
        load = torch.bincount(expert, minlength=4)
        assert int(load.max()) > 20
        assert int(load.min()) < 8


@pytest.mark.parametrize("capacity", [None, 5])
def test_random_routing_is_a_routing(capacity: int | None) -> None:
    routing = random_routing(20, 4, 2, capacity=capacity)
    check_routing(routing)
    assert bool(routing.kept.all()) == (capacity is None)
    assert_close(routing.weight.view(2, 20).sum(0), torch.ones(20))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token", torch.tensor([0, 1, 3]), r"token must be in 0..2"),
        ("expert", torch.tensor([0, -1, 1]), r"expert must be in 0..1"),
        ("expert", torch.tensor([0, 0, 1], dtype=torch.int32), "expert must be int64, not torch.int32"),
        ("weight", torch.ones(3, dtype=torch.bfloat16), "weights must be at least float32"),
        ("weight", torch.tensor([1.0, NAN, 1.0]), "kept weights must be finite and not negative"),
        ("weight", torch.ones(2), r"weight has shape \(2,\) and token has 3 entries"),
        ("kept", torch.ones(3), "kept must be bool"),
        ("position", torch.tensor([0, -2, 0]), "positions start at 0; -1 means never queued"),
        ("position", torch.tensor([0, -1, 0]), "kept without a place in the queue"),
        ("position", torch.tensor([0, 0, 0]), r"places of queued assignments of expert 0 must be 0..n-1"),
        ("kept", torch.tensor([False, True, True]), r"places of kept assignments of expert 0 must be 0..n-1"),
        ("kept", torch.tensor([True, False, True]), "a routing without capacity must keep all it queues"),
        ("losses", {"load_balance": torch.tensor(NAN)}, "losses 'load_balance' is nan"),
        ("losses", {"load_balance": torch.tensor(1)}, "losses 'load_balance' is torch.int64"),
    ],
)
def test_routing_rules(field: str, value: object, message: str) -> None:
    sound = dataclasses.replace(
        random_routing(3, 2, 1),
        token=torch.arange(3),
        expert=torch.tensor([0, 0, 1]),
        position=torch.tensor([0, 1, 0]),
    )
    check_routing(sound)
    with pytest.raises(AssertionError, match=message):
        check_routing(dataclasses.replace(sound, **{field: value}))


def test_trace_names_everything() -> None:
    module = nn.Linear(3, 2)
    module.unused = nn.Parameter(torch.ones(1))
    found = trace(module, module, torch.randn(4, 3))
    assert set(found) == {
        "output",
        "gradient of x",
        "gradient of weight",
        "gradient of bias",
        "gradient of unused",
    }
    assert not found["gradient of unused"].any()
    assert found["gradient of weight"].any()
    assert module.weight.grad is None


# Functions that processes run.


def many_cases(number: int) -> dict[str, object]:
    total = torch.tensor(dist.get_rank() + number)
    dist.all_reduce(total)
    gathered = [torch.empty(2) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.full((2,), float(dist.get_rank())))
    return {
        "total": total,
        "gathered": gathered,
        "threads": torch.get_num_threads(),
        "process": os.getpid(),
        "random": float(torch.rand(())),
    }


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only here")
    dist.all_reduce(torch.ones(1))


def aborts() -> None:
    os.abort()


def dies_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def exits_quietly() -> None:
    sys.exit(0)


def hangs_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def returns_an_object() -> object:
    return Path("somewhere")


def test_processes_meet_and_return_by_rank() -> None:
    first, second = run_distributed(many_cases, 2, 10)
    assert (int(first["total"]), int(second["total"])) == (21, 21)
    for result in (first, second):
        assert [t.tolist() for t in result["gathered"]] == [[0.0, 0.0], [1.0, 1.0]]
        assert result["threads"] == 1
        assert result["random"] == first["random"]
    assert len({first["process"], second["process"], os.getpid()}) == 3


def test_an_exception_comes_back_with_rank_and_traceback() -> None:
    """The first one, not what its end did to the other rank; and without waiting for the time limit."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*in fails_on_rank_1.*KeyError: 'only here'"):
        run_distributed(fails_on_rank_1, 2, timeout=300)
    assert time.monotonic() - begin < 100


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"rank [01] of 2 failed"):
        run_distributed(dies_on_rank_0, 2)


def test_a_process_that_aborts_says_where() -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)rank 0 of 1 failed.*exit code -6.*Fatal Python error: Aborted.* in aborts"
    ):
        run_distributed(aborts, 1)


def test_leaving_early_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of 1 failed.*SystemExit"):
        run_distributed(exits_quietly, 1)


def test_a_hang_ends_and_says_where() -> None:
    run_distributed(sums, 2, [0])  # the slow start is no part of the short time limit
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] of 2 did not end in time.*in hangs_on_rank_1"):
        run_distributed(hangs_on_rank_1, 2, timeout=6)


def test_only_plain_results_come_back() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of 1 failed.*cannot be sent back: PosixPath"):
        run_distributed(returns_an_object, 1)


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one process: got world_size=0"):
        run_distributed(many_cases, 0)


def test_results_are_tensors() -> None:
    """A loop over many cases in one call: the way to use it."""
    (result,) = run_distributed(sums, 1, [1, 2, 3])
    assert isinstance(result[0], Tensor)
    assert [int(t) for t in result] == [1, 2, 3]


def sums(values: list[int]) -> list[Tensor]:
    results = []
    for value in values:
        total = torch.tensor(value)
        dist.all_reduce(total)
        results.append(total)
    return results


def test_what_a_routing_says_of_itself_must_hold() -> None:
    routing = random_routing(9, 4, 2, capacity=2)
    check_routing(routing)
    check_routing(dataclasses.replace(routing, choices=2))
    with pytest.raises(AssertionError, match="all_kept says that all are kept, and"):
        check_routing(dataclasses.replace(routing, all_kept=True))
    with pytest.raises(AssertionError, match="choices=1 says that the list is choice-major"):
        check_routing(dataclasses.replace(routing, choices=1))
