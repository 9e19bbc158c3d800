"""Fine-grained and shared experts: same cost, same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moekit import Capacity, MoELayer, routers
from moekit.dispatch import PaddedDispatcher
from moekit.experts import FineGrained, GroupedGLU, fine_grained
from moekit.testing import assert_close
from moekit.transformer import GLU

D = 8


def flops_of_experts(num_experts: int, hidden_dim: int, k: int, shared: nn.Module | None = None) -> float:
    """Per token, in padded form with a capacity factor of 1 and 2 E tokens, which makes exactly k rows a token."""
    router = routers.TopKRouter(D, num_experts, k, capacity=Capacity(eval=1.0, minimum=1))
    layer = MoELayer(router, GroupedGLU(num_experts, D, hidden_dim), PaddedDispatcher(), shared).eval()
    tokens = 2 * num_experts
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, D))
    scores = 2 * D * num_experts  # the router's own product grows with the number of experts
    return counter.get_total_flops() / tokens - scores


@pytest.mark.parametrize(("split", "shared"), [(1, 0), (2, 0), (4, 0), (2, 1), (4, 3)])
def test_flops_and_parameters_stay(split: int, shared: int) -> None:
    sizes = fine_grained(8, 16, 2, split=split, shared=shared)
    dense = GLU(D, sizes.shared_hidden_dim) if shared else None
    bank = GroupedGLU(sizes.num_experts, D, sizes.hidden_dim)
    count = sum(p.numel() for p in bank.parameters()) + sum(p.numel() for p in (dense or nn.Identity()).parameters())
    assert count == sum(p.numel() for p in GroupedGLU(8, D, 16).parameters())
    found = flops_of_experts(sizes.num_experts, sizes.hidden_dim, sizes.k, dense)
    assert found == flops_of_experts(8, 16, 2) == 2 * 2 * 3 * D * 16


def test_numbers() -> None:
    """16 experts of which two are chosen, cut in four, one part always on: 63 to choose 7 from (arXiv:2401.06066)."""
    assert fine_grained(16, 1024, 2, split=4, shared=1) == FineGrained(63, 256, 7, 256)
    assert fine_grained(8, 64, 1, split=1) == FineGrained(8, 64, 1, 0)


def test_shared_experts_are_one_wider_feed_forward() -> None:
    """The sum of S experts of size F equals one of size S F with their weights side by side."""
    bank = GroupedGLU(3, D, 4, activation="silu", init_scale=1.0)
    wide, x = GLU(D, 12, activation="silu"), torch.randn(7, D)
    with torch.no_grad():
        gate, up = (w.transpose(0, 1).reshape(D, 12) for w in (bank.w_gate, bank.w_up))
        wide.w_in.weight.copy_(torch.stack([gate.t(), up.t()]))
        wide.w_out.weight.copy_(bank.w_out.reshape(12, D).t())
    assert_close(wide(x), sum(bank.reference(e, x) for e in range(3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 3}, "split must divide hidden_dim.*got split=3 and hidden_dim=16"),
        ({"split": 0}, "split must divide"),
        ({"split": 2, "shared": 4}, "at least one choice of the k \\* split = 4 small experts: got 4"),
        ({"split": 2, "shared": -1}, "got -1"),
    ],
)
def test_senseless_splits(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fine_grained(8, 16, 2, **options)
