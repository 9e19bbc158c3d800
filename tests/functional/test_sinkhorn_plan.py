"""The balanced plan: its sums, its form, its limits; against the plain iteration on exponentials."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.functional import sinkhorn
from moekit.testing import assert_close, skewed_tokens, some_mask

T, E = 30, 4


def scores(dtype: torch.dtype = torch.float64) -> Tensor:
    return skewed_tokens(T, E, seed=3, dtype=dtype)


def plain(scores: Tensor, sweeps: int = 2000) -> Tensor:
    """Scale rows and columns of exp(scores) in turn."""
    plan = scores.exp()
    for _ in range(sweeps):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0) * (plan.shape[0] / plan.shape[1])
    return plan


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_plain_iteration(padded: bool) -> None:
    mask = some_mask(T) if padded else None
    plan = sinkhorn(scores(), mask, iterations=5000, tol=1e-13)
    real = torch.ones(T, dtype=torch.bool) if mask is None else mask
    assert_close(plan[real], plain(scores()[real]))
    assert not bool(plan[~real].any())


def test_rows_send_one_and_columns_receive_their_share() -> None:
    plan = sinkhorn(scores(), tol=1e-3, iterations=1000)
    assert_close(plan.sum(1), torch.ones(T, dtype=torch.float64))
    uneven = float((plan.sum(0) * E / T - 1).abs().max())
    assert uneven < 1e-3
    assert float((scores().softmax(-1).sum(0) * E / T - 1).abs().max()) > 0.3, "the case is balanced from the start"


def test_it_stops_at_the_tolerance_and_at_the_bound() -> None:
    def uneven(**limits: float) -> float:
        return float((sinkhorn(scores(), **limits).sum(0) * E / T - 1).abs().max())  # type: ignore[arg-type]

    assert uneven(iterations=1) > uneven(iterations=5) > uneven(iterations=1000, tol=1e-9)
    assert 1e-6 < uneven(iterations=1000, tol=1e-2) < 1e-2
    assert uneven(iterations=1000, tol=1e-9) < 1e-9


def test_the_graph_that_cannot_stop_early_has_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = sinkhorn(scores(torch.float32), tol=1e-2, iterations=300)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(sinkhorn(scores(torch.float32), tol=1e-2, iterations=300), eager)


def test_scores_of_any_size() -> None:
    """Where exp(scores) would overflow, or all prefer one expert by far."""
    plan = sinkhorn(scores(torch.float32) * 100 + 500, iterations=2000)
    assert bool(plan.isfinite().all())
    assert_close(plan.sum(1), torch.ones(T))
    even = sinkhorn(torch.tensor([[50.0, -50.0]] * 6))
    assert_close(even, torch.full((6, 2), 0.5))


def test_types_gradient_and_padding_content() -> None:
    wide = scores(torch.float32)
    plan = sinkhorn(wide.bfloat16().requires_grad_())
    assert plan.dtype == torch.float32
    assert not plan.requires_grad
    assert_close(plan, sinkhorn(wide.bfloat16().float()))
    mask = some_mask(T)
    assert torch.equal(sinkhorn(wide.masked_fill(~mask[:, None], float("nan")), mask), sinkhorn(wide, mask))


def test_no_tokens() -> None:
    assert sinkhorn(torch.empty(0, E)).shape == (0, E)
    nobody = sinkhorn(scores(), torch.zeros(T, dtype=torch.bool))
    assert torch.equal(nobody, torch.zeros_like(nobody))


@pytest.mark.parametrize("limits", [{"iterations": 0}, {"tol": -1e-3}])
def test_limits_are_checked(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one iteration and a tolerance of at least 0"):
        sinkhorn(scores(), **limits)  # type: ignore[arg-type]
