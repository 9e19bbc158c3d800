"""Importance, smooth load and squared variation against literal loops from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.functional import importance_loss, load_loss, selection_probability, squared_variation
from moekit.testing import assert_close

T, E = 17, 5


def normal_cdf(z: float) -> float:
    """Phi by Simpson's rule on the density: nothing shared with the code under test."""
    if z > 12:
        return 1.0
    if z < -12:
        return 0.0
    n, low = 2000, -12.0
    h = (z - low) / n
    heights = [math.exp(-0.5 * (low + i * h) ** 2) for i in range(n + 1)]
    weighted = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return h / 3 * weighted / math.sqrt(2 * math.pi)


def scores(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(T, E, generator=generator, dtype=torch.float64)
    scale = torch.rand(T, E, generator=generator, dtype=torch.float64) + 0.2
    return clean, clean + scale * torch.randn(T, E, generator=generator, dtype=torch.float64), scale


@pytest.mark.parametrize("k", [1, 2, E - 1])
def test_selection_probability_equals_equation_8_and_9(k: int) -> None:
    clean, noisy, scale = scores()
    found = selection_probability(clean, noisy, scale, k)
    for s in range(T):
        for i in range(E):
            others = sorted((float(noisy[s, j]) for j in range(E) if j != i), reverse=True)
            expected = normal_cdf(float((clean[s, i] - others[k - 1]) / scale[s, i]))
            assert float(found[s, i]) == pytest.approx(expected, abs=1e-8), (s, i)


def test_selection_probability_is_the_frequency_of_being_chosen() -> None:
    """Draw the noise of one expert many times, the others' noise fixed: how often is it among the k?"""
    clean, noisy, scale = (tensor[:3] for tensor in scores(3))
    found = selection_probability(clean, noisy, scale, 2)
    draws = 40_000
    for i in range(E):
        again = noisy.expand(draws, 3, E).clone()
        again[:, :, i] = clean[:, i] + scale[:, i] * torch.randn(draws, 3, dtype=torch.float64)
        share = (again.topk(2).indices == i).any(-1).double().mean(0)
        assert bool((share - found[:, i]).abs().max() < 4 * 0.5 / draws**0.5)


def test_all_are_chosen_where_k_is_e() -> None:
    clean, noisy, scale = scores()
    assert torch.equal(selection_probability(clean, noisy, scale, E), torch.ones_like(clean))
    assert float(load_loss(clean, noisy, scale, E)) == 0.0


def test_no_noise_is_a_step_with_finite_gradients() -> None:
    """softplus underflows: the scale is 0, and the probability 0 or 1."""
    clean, _, _ = scores()
    clean, scale = clean.float().requires_grad_(), torch.zeros(T, E, requires_grad=True)
    probability = selection_probability(clean, clean, scale, 2)
    chosen = torch.zeros(T, E).scatter(1, clean.topk(2).indices, 1.0)
    assert_close(probability, chosen)
    for grad in torch.autograd.grad(probability.square().sum(), (clean, scale)):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("padded", [False, True])
def test_losses_equal_the_loop(padded: bool) -> None:
    """Equations 6-7 and 10-11: CV = standard deviation / mean over experts, squared."""
    clean, noisy, scale = scores()
    mask = torch.arange(T) % 4 != 1 if padded else None
    real = [s for s in range(T) if mask is None or mask[s]]
    probability = selection_probability(clean, noisy, scale, 2)
    totals = [sum(float(probability[s, e]) for s in real) for e in range(E)]
    mean = sum(totals) / E
    expected = sum((total - mean) ** 2 for total in totals) / E / mean**2
    if mask is not None:
        clean, noisy, scale = (torch.where(mask[:, None], x, float("nan")) for x in (clean, noisy, scale))
    clean.requires_grad_()
    found = load_loss(clean, noisy, scale, 2, mask)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(found, clean)
    assert bool(grad.isfinite().all())
    assert mask is None or not grad[~mask].any()

    top, expert = torch.randn(T, E, dtype=torch.float64).topk(2)
    weight = top.softmax(-1)
    totals = [sum(float(weight[s, c]) for s in real for c in (0, 1) if expert[s, c] == e) for e in range(E)]
    mean = sum(totals) / E
    expected = sum((total - mean) ** 2 for total in totals) / E / mean**2
    counted = None if mask is None else mask[:, None].expand(T, 2)
    if mask is not None:
        weight = torch.where(mask[:, None], weight, float("nan"))
    assert float(importance_loss(weight, expert, E, counted)) == pytest.approx(expected, rel=1e-9)
    # As a list of assignments it is the same number.
    flat = None if counted is None else counted.flatten()
    assert float(importance_loss(weight.flatten(), expert.flatten(), E, flat)) == pytest.approx(expected, rel=1e-9)


def test_known_values() -> None:
    even = torch.arange(12)[:, None] % 4
    assert float(importance_loss(torch.ones(12, 1), even, 4)) == 0.0
    assert float(importance_loss(torch.full((12, 1), 0.3), even, 4)) == pytest.approx(0.0, abs=1e-12)
    collapsed = torch.zeros(12, 1, dtype=torch.int64)
    assert float(importance_loss(torch.ones(12, 1), collapsed, 4)) == 3.0  # E - 1
    assert float(squared_variation(torch.tensor([1.0, 3.0]))) == 0.25
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    uniform = torch.tensor([[1.0, 2, 3, 4], [4, 1, 2, 3], [3, 4, 1, 2], [2, 3, 4, 1]], dtype=torch.float64)
    assert float(load_loss(zeros[:4], uniform, zeros[:4] + 1, 2)) == pytest.approx(0.0, abs=1e-15)


def test_nothing_gives_zero_and_a_zero_gradient() -> None:
    for t in (0, 3):
        x = torch.zeros(t, 4, requires_grad=True)
        mask = torch.zeros(t, dtype=torch.bool)
        total = load_loss(x, x, x + 1, 2, mask) + importance_loss(
            x, torch.zeros(t, 4, dtype=torch.int64), 4, mask[:, None]
        )
        assert float(total.detach()) == 0.0
        (grad,) = torch.autograd.grad(total, x)
        assert not grad.any()


def test_gradcheck() -> None:
    clean, noisy, scale = (tensor[:6].clone().requires_grad_() for tensor in scores())
    mask = torch.arange(6) != 2
    assert torch.autograd.gradcheck(lambda *args: selection_probability(*args, 2), (clean, noisy, scale))
    assert torch.autograd.gradcheck(lambda *args: load_loss(*args, 2, mask), (clean, noisy, scale))
    weight = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([[0, 1], [1, 2], [0, 3], [3, 4], [2, 0], [1, 0]])
    assert torch.autograd.gradcheck(lambda w: importance_loss(w, expert, E, mask[:, None].expand(6, 2)), (weight,))
    total = torch.rand(E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_variation, (total,))
