"""Adafactor against the formula written out, against transformers, and what an expert bank's first dimension means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.experts import GroupedMLP
from moekit.training.adafactor import Adafactor
from moekit.training.optimizers import adafactor

STEPS = 5


def gradients(*shape: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [scale * torch.randn(shape, generator=generator) for _ in range(STEPS)]


def trained(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach().clone()


def obvious(weight: Tensor, grads: list[Tensor], lr: float, clip: float) -> Tensor:
    """The algorithm of arXiv:1804.04235 for one matrix, in float64, with explicit loops over entries."""
    weight = weight.double().clone()
    n, m = weight.shape
    row, column = [0.0] * n, [0.0] * m
    for step, grad in enumerate((g.double() for g in grads), 1):
        beta = 1 - step**-0.8
        for i in range(n):
            row[i] = beta * row[i] + (1 - beta) * sum(float(grad[i, j]) ** 2 + 1e-30 for j in range(m)) / m
        for j in range(m):
            column[j] = beta * column[j] + (1 - beta) * sum(float(grad[i, j]) ** 2 + 1e-30 for i in range(n)) / n
        mean = sum(row) / n
        update = torch.tensor(
            [[float(grad[i, j]) / math.sqrt(row[i] * column[j] / mean) for j in range(m)] for i in range(n)],
            dtype=torch.float64,
        )
        rms = math.sqrt(float(update.square().mean()))
        update /= max(1.0, rms / clip)
        weight -= lr * max(1e-3, math.sqrt(float(weight.square().mean()))) * update
    return weight


@pytest.mark.parametrize("clip", [1.0, 0.1])
def test_a_matrix_by_the_formula(clip: float) -> None:
    start, grads = 0.1 * torch.randn(3, 5), gradients(3, 5)
    parameter = nn.Parameter(start.clone())
    found = trained(Adafactor([parameter], 0.05, clip_update=clip, min_factored_size=1), parameter, grads)
    torch.testing.assert_close(found.double(), obvious(start, grads, 0.05, clip), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (5,), (2, 6, 4), ()])
@pytest.mark.parametrize("options", [{}, {"scale_by_parameter": False}, {"clip_update": 0.3}])
def test_as_in_transformers(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers.optimization")
    torch.manual_seed(1)
    start, grads = torch.randn(shape), gradients(*shape, scale=10.0)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = transformers.Adafactor(
        [theirs],
        lr=0.02,
        relative_step=False,
        clip_threshold=options.get("clip_update", 1.0),
        scale_parameter=options.get("scale_by_parameter", True),
    )
    found = trained(Adafactor([mine], 0.02, min_factored_size=1, **options), mine, grads)
    torch.testing.assert_close(found, trained(reference, theirs, grads), rtol=1e-5, atol=1e-6)


def test_weights_decay_at_the_learning_rate() -> None:
    parameter = nn.Parameter(torch.full((2, 3), 4.0))
    found = trained(Adafactor([parameter], 0.1, weight_decay=0.5), parameter, [torch.zeros(2, 3)])
    torch.testing.assert_close(found, torch.full((2, 3), 4.0 * (1 - 0.1 * 0.5)))


def test_each_expert_is_a_matrix_of_its_own() -> None:
    """A bank is stepped as its experts would be one by one; without `batch_dims` RMS are taken over all of them."""
    torch.manual_seed(1)
    start = torch.randn(3, 6, 4) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    grads = gradients(3, 6, 4)
    bank = nn.Parameter(start.clone())
    found = trained(Adafactor([bank], 0.02, min_factored_size=1, batch_dims=1), bank, grads)
    for expert in range(3):
        alone = nn.Parameter(start[expert].clone())
        expected = trained(Adafactor([alone], 0.02, min_factored_size=1), alone, [g[expert] for g in grads])
        torch.testing.assert_close(found[expert], expected, rtol=1e-5, atol=1e-6)
    together = nn.Parameter(start.clone())
    assert (trained(Adafactor([together], 0.02, min_factored_size=1), together, grads) - found).abs().max() > 1e-2


def test_state_is_a_row_and_a_column() -> None:
    bank = GroupedMLP(4, 8, 16, bias=True)
    optimizer = adafactor(bank, lr=0.1, min_factored_size=8)
    for parameter in bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shapes = {
        name: {key: tuple(value.shape) for key, value in optimizer.state[p].items() if key != "step"}
        for name, p in bank.named_parameters()
    }
    assert shapes["w_in"] == {"row": (4, 8), "column": (4, 16)}
    # A bias of a bank is one vector for each expert, however large.
    assert shapes["b_in"] == {"square": (4, 16)}


def test_state_stays_in_float32_and_survives_loading() -> None:
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(4, 4).bfloat16())
    grads = [g.bfloat16() for g in gradients(4, 4)]
    whole = nn.Parameter(parameter.detach().clone())
    expected = trained(Adafactor([whole], 0.1, min_factored_size=1), whole, grads)
    first = Adafactor([parameter], 0.1, min_factored_size=1)
    trained(first, parameter, grads[:2])
    second = Adafactor([parameter], 0.1, min_factored_size=1)
    second.load_state_dict(first.state_dict())
    assert second.state[parameter]["row"].dtype == torch.float32
    assert torch.equal(trained(second, parameter, grads[2:]), expected)


def test_what_cannot_be_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="lr >= 0"):
        Adafactor([parameter], -1.0)
    with pytest.raises(ValueError, match="clip_update must be positive"):
        Adafactor([parameter], 1.0, clip_update=0.0)
    with pytest.raises(ValueError, match="eps_moment > 0"):
        Adafactor([parameter], 1.0, eps_moment=0.0)
    with pytest.raises(ValueError, match="eps_scale >= 0"):
        Adafactor([parameter], 1.0, eps_scale=-1.0)
    with pytest.raises(ValueError, match="batch_dims must be the number"):
        Adafactor([parameter], 1.0, batch_dims=-1)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        Adafactor(table.parameters(), 1.0).step()
