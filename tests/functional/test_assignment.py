"""Queues against literal loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit.functional import queue_positions, service_order

# Both branches of `queue_positions`: counting for few experts, sorting for many.
FEW, MANY = 5, 40


def literal_positions(expert: Tensor, queued: Tensor, num_experts: int, order: Tensor | None) -> list[int]:
    """Serve one assignment after the other."""
    served = [0] * num_experts
    place = [-1] * expert.numel()
    for n in range(expert.numel()) if order is None else order.tolist():
        if queued[n]:
            place[n] = served[int(expert[n])]
            served[int(expert[n])] += 1
    return place


def literal_order(probs: Tensor, priority: str, draws: Tensor | None = None) -> list[int]:
    """Choice after choice; within a choice the tokens by the priority."""
    k, t = probs.shape
    order = []
    for choice in range(k):
        if priority == "position":
            tokens = list(range(t))
        elif priority == "probability":
            tokens = sorted(range(t), key=lambda s: (-max(probs[c, s].item() for c in range(k)), s))
        else:
            assert draws is not None
            tokens = sorted(range(t), key=lambda s, c=choice: draws[c, s].item())
        order += [choice * t + s for s in tokens]
    return order


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_experts=st.sampled_from([1, 2, FEW, MANY]),
    n=st.integers(0, 60),
    share_queued=st.sampled_from([0.0, 0.6, 1.0]),
    permuted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_positions_equal_the_loop(num_experts: int, n: int, share_queued: float, permuted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, num_experts, (n,), generator=generator)
    queued = torch.rand(n, generator=generator) < share_queued
    order = torch.randperm(n, generator=generator) if permuted else None
    found = queue_positions(expert, queued, num_experts, order)
    assert found.dtype == torch.int64
    assert found.tolist() == literal_positions(expert, queued, num_experts, order)
    with torch.no_grad():  # counted one by one
        counted = queue_positions(expert, queued, num_experts, order)
    assert counted.dtype == torch.int64
    assert torch.equal(counted, found)


@pytest.mark.parametrize(("k", "t"), itertools.product([1, 2, 3], [0, 1, 17]))
@pytest.mark.parametrize("priority", ["position", "probability", "random"])
def test_order_equals_the_loop(k: int, t: int, priority: str) -> None:
    probs = torch.rand(k, t).mul(8).round() / 8  # many ties
    torch.manual_seed(5)
    found = service_order(probs, priority)  # type: ignore[arg-type]
    torch.manual_seed(5)
    draws = torch.rand(k, t)
    expected = literal_order(probs, priority, draws)
    assert (list(range(k * t)) if found is None else found.tolist()) == expected


def test_position_needs_no_order() -> None:
    assert service_order(torch.rand(2, 3), "position") is None


def test_generator_decides_random_order() -> None:
    probs = torch.rand(2, 50)
    first = service_order(probs, "random", generator=torch.Generator().manual_seed(4))
    second = service_order(probs, "random", generator=torch.Generator().manual_seed(4))
    other = service_order(probs, "random", generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_random_selection_is_uniform() -> None:
    """Every token survives equally often, wherever it stands (random token selection)."""
    tokens, slots, draws = 12, 3, 3000
    survived = torch.zeros(tokens)
    expert, queued = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        order = service_order(torch.ones(1, tokens), "random", generator=generator)
        survived += queue_positions(expert, queued, 1, order) < slots
    expected = draws * slots / tokens
    chi_square = float(((survived - expected) ** 2 / expected).sum())
    assert chi_square < 31.3  # 99.9 % of chi-square with 11 degrees of freedom
    assert chi_square > 2.0  # a fixed rotation would be too even


def test_random_order_does_not_depend_on_the_default_type() -> None:
    """Under bf16 as torch's default type draws would have 256 values, and every tie a preference."""
    probs = torch.rand(1, 3000)
    expected = service_order(probs, "random", generator=torch.Generator().manual_seed(4))
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = service_order(probs, "random", generator=torch.Generator().manual_seed(4))
    finally:
        torch.set_default_dtype(was)
    assert torch.equal(found, expected)


def test_random_choices_are_drawn_apart() -> None:
    """The order inside the second choice is not that of the first."""
    order = service_order(torch.rand(2, 40), "random")
    assert order is not None
    assert not torch.equal(order[:40], order[40:] - 40)
    assert sorted(order[:40].tolist()) == list(range(40))


def test_first_choices_are_served_first() -> None:
    """Whatever the priority, a second choice waits behind all first ones."""
    k, t = 2, 30
    for priority in ("position", "probability", "random"):
        order = service_order(torch.rand(k, t), priority)  # type: ignore[arg-type]
        position = queue_positions(torch.zeros(k * t, dtype=torch.int64), torch.ones(k * t, dtype=torch.bool), 1, order)
        assert int(position[:t].max()) < int(position[t:].min())
