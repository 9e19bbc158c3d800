"""The reference layer by hand."""

from __future__ import annotations

import torch

from moekit.functional import moe_reference
from moekit.routing import Routing


def routing_of(assignments: list[tuple[int, int, float, bool]], num_tokens: int) -> Routing:
    token, expert, weight, kept = zip(*assignments, strict=True) if assignments else ((), (), (), ())
    return Routing(
        token=torch.tensor(token, dtype=torch.int64),
        expert=torch.tensor(expert, dtype=torch.int64),
        weight=torch.tensor(weight, dtype=torch.float32),
        position=torch.zeros(len(token), dtype=torch.int64),
        kept=torch.tensor(kept, dtype=torch.bool),
        num_tokens=num_tokens,
        num_experts=3,
    )


def multiply(expert: int, rows: torch.Tensor) -> torch.Tensor:
    return rows * (expert + 1)


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]])
    routing = routing_of([(0, 0, 0.5, True), (0, 2, 0.5, True), (1, 1, 1.0, False), (2, 1, 2.0, True)], 3)
    # token 0: 0.5 * 1 x + 0.5 * 3 x; token 1: dropped; token 2: 2 * 2 x
    assert moe_reference(x, routing, multiply).tolist() == [[2.0, 4.0], [0.0, 0.0], [20.0, 20.0]]


def test_adds_in_float32() -> None:
    """1 + eight times 1/512 is lost in bf16 step by step, and is not in float32."""
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    routing = routing_of([(0, 0, 1.0, True)] + [(0, 0, 1 / 512, True)] * 8, 1)
    out = moe_reference(x, routing, multiply)
    assert out.dtype == torch.bfloat16
    assert float(out) == 1.015625


def test_no_token() -> None:
    assert moe_reference(torch.zeros(0, 2), routing_of([], 0), multiply).shape == (0, 2)
