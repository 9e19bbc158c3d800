"""Balanced assignment against scipy, which solves the expanded problem: experts as slots."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit import functional, kernels

# The modules, which the functions of the same name hide.
in_torch = importlib.import_module("moekit.functional.balanced_assignment")
in_numba = importlib.import_module("moekit.kernels.balanced_assignment")


def interpreted(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loops that numba compiles, run by Python."""
    assert mask is None
    return torch.from_numpy(in_numba._solve(in_torch.finite_scores(scores), lambda function: function))


SOLVERS = {"torch": functional.balanced_assignment, "numba": kernels.balanced_assignment}
COMPILED = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
Solver = Callable[..., Tensor]


def optimum(scores: Tensor) -> float:
    """The best sum of scores with loads of floor(T / E) or one more: a huge bonus makes scipy fill the first slots."""
    t, e = scores.shape
    wide = scores.double().numpy()
    floor, bonus = t // e, 4.0 * (np.ptp(wide) + 1.0) * max(t, 1) if wide.size else 0.0
    slots = np.concatenate([*([wide + bonus] * floor), *([wide] if t % e else [])], axis=1) if t else wide
    rows, columns = linear_sum_assignment(slots, maximize=True)
    return float(slots[rows, columns].sum() - bonus * floor * e)


def value(scores: Tensor, expert: Tensor) -> float:
    return float(scores.double()[torch.arange(len(expert)), expert].sum())


def zipf(t: int, e: int, seed: int = 0) -> Tensor:
    """Tokens in clusters of very uneven size, each near one expert."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(e, 8, generator=generator)
    cluster = torch.multinomial(1 / torch.arange(1.0, e + 1), t, replacement=True, generator=generator)
    return (experts[cluster] + 0.5 * torch.randn(t, 8, generator=generator)) @ experts.t()


def check(scores: Tensor, expert: Tensor) -> None:
    """Balanced, and as good as scipy's."""
    t, e = scores.shape
    load = torch.bincount(expert, minlength=e)
    assert load.numel() == e
    assert int(load.min()) >= t // e
    assert int(load.max()) <= -(-t // e)
    assert value(scores, expert) == pytest.approx(optimum(scores), rel=1e-9, abs=1e-9 * float(scores.abs().sum() + 1))


@st.composite
def problems(draw: st.DrawFn) -> Tensor:
    t, e = draw(st.integers(0, 13)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["ties", "real", "zipf", "equal tokens", "zero"]))
    if kind == "zipf":
        return zipf(t, e, draw(st.integers(0, 99))) if t else torch.zeros(0, e)
    if kind == "zero":
        return torch.zeros(t, e)
    one = st.integers(0, 2).map(float) if kind == "ties" else st.floats(-50, 50, width=32)
    rows = 1 if kind == "equal tokens" else t
    scores = torch.tensor(draw(st.lists(one, min_size=rows * e, max_size=rows * e)), dtype=torch.float64).view(rows, e)
    return scores.expand(t, e) if kind == "equal tokens" else scores


@pytest.mark.parametrize("solve", [*SOLVERS.values(), interpreted], ids=[*SOLVERS, "interpreted"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores=problems())
def test_optimal(solve: Solver, scores: Tensor) -> None:
    check(scores, solve(scores))


@COMPILED
@pytest.mark.parametrize(("t", "e"), [(96, 8), (101, 8), (300, 7), (350, 25), (9, 40)])
def test_optimal_where_prices_are_sought_first(solve: Solver, t: int, e: int) -> None:
    generator = torch.Generator().manual_seed(t)
    check(zipf(t, e), solve(zipf(t, e)))
    real = torch.randn(t, e, generator=generator)
    check(real, solve(real))
    ties = torch.randint(0, 3, (t, e), generator=generator).float()
    check(ties, solve(ties))


def test_both_forms_agree_on_a_large_problem() -> None:
    """Where no two assignments are equally good, they are the same assignment."""
    for t in (1024, 1030):
        scores = zipf(t, 16)
        assert torch.equal(functional.balanced_assignment(scores), kernels.balanced_assignment(scores))


@COMPILED
def test_padding_takes_no_part(solve: Solver) -> None:
    scores = zipf(41, 5)
    mask = torch.arange(41) % 7 < 5
    alone = solve(scores[mask])
    filled = scores.masked_fill(~mask[:, None], float("nan"))
    found = solve(filled, mask)
    assert torch.equal(found[mask], alone)
    assert bool((found[~mask] == -1).all())
    assert bool((solve(scores, torch.zeros(41, dtype=torch.bool)) == -1).all())


@COMPILED
def test_scores_that_are_no_numbers(solve: Solver) -> None:
    """NaN and -inf count as the lowest finite score, +inf as the highest."""
    scores = zipf(24, 4)
    broken, clean = scores.clone(), scores.clone()
    broken[3, 1], broken[5, 0], broken[7, 2] = float("nan"), -float("inf"), float("inf")
    clean[3, 1], clean[5, 0], clean[7, 2] = scores.min(), scores.min(), scores.max()
    assert torch.equal(solve(broken), solve(clean))
    nothing = solve(torch.full((8, 4), float("nan")))
    assert torch.bincount(nothing).tolist() == [2, 2, 2, 2]


@COMPILED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_types_and_extremes(solve: Solver, dtype: torch.dtype) -> None:
    scores = zipf(30, 4).to(dtype)
    check(scores, solve(scores))
    largest = torch.finfo(dtype).max
    extreme = torch.tensor([[largest, -largest], [largest, -largest], [0.0, -largest], [0.0, 0.0]], dtype=dtype)
    assert solve(extreme).tolist() == [0, 0, 1, 1]


@COMPILED
def test_same_answer_again_and_scores_untouched(solve: Solver) -> None:
    scores = torch.randint(0, 2, (200, 6), generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    before = scores.detach().clone()
    state = torch.get_rng_state()
    first = solve(scores)
    assert torch.equal(first, solve(scores))
    assert torch.equal(scores, before)
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad
    assert first.dtype == torch.int64


@COMPILED
def test_errors(solve: Solver) -> None:
    with pytest.raises(ValueError, match=r"scores Float\[T, E\].*got shape \(3,\)"):
        solve(torch.zeros(3))
    with pytest.raises(ValueError, match="at least one expert"):
        solve(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"mask Bool\[T\].*torch.int64"):
        solve(torch.zeros(3, 2), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="for 3 tokens"):
        solve(torch.zeros(3, 2), torch.ones(4, dtype=torch.bool))


def test_without_numba_the_operator_is_the_twin_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, called = zipf(50, 4), []

    def spy(scores: Tensor, mask: Tensor | None) -> Tensor:
        called.append(scores)
        return functional.balanced_assignment(scores, mask)

    monkeypatch.setattr(in_numba, "has_numba", lambda: False)
    monkeypatch.setattr(in_numba, "balanced_assignment_reference", spy)
    mask = torch.arange(50) < 44
    assert torch.equal(kernels.balanced_assignment(scores, mask), functional.balanced_assignment(scores, mask))
    assert len(called) == 1


def test_a_numba_that_cannot_be_imported_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_numba.has_numba.__wrapped__()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not in_numba.has_numba.__wrapped__()


def test_operator() -> None:
    """Fake shapes, and no input changed or returned."""
    scores, mask = zipf(12, 3), torch.arange(12) % 3 > 0
    torch.library.opcheck(in_numba._balanced_assignment, (scores, None))
    torch.library.opcheck(in_numba._balanced_assignment, (scores, mask))
