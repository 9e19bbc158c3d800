"""Rows of a choice-major list, gathered instead of scattered: outputs and all gradients against the obvious form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.kernels import listed_rows
from moekit.kernels.listed_rows import sum_rows, sum_rows_reference, take_rows, take_rows_reference
from moekit.testing import assert_close

SIZES = {"one choice": (7, 1, 5), "two": (6, 2, 3), "three": (4, 3, 2), "one token": (1, 2, 4), "no token": (0, 2, 4)}


def listed(tokens: int, choices: int) -> tuple[Tensor, Tensor]:
    """The token of each row, and the row of each assignment."""
    order = torch.randperm(tokens * choices, generator=torch.Generator().manual_seed(1))  # assignment of each row
    row = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return order % max(tokens, 1), row


@pytest.fixture(params=[1, 1 << 17], ids=["rows one by one", "all rows at once"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_rows, "_PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_equals_its_twin(size: tuple[int, int, int]) -> None:
    tokens, choices, dim = size
    token, row = listed(tokens, choices)
    x = torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * choices, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(tokens * choices, dtype=torch.float64, requires_grad=True)
    taken = [take_rows(x, token, row, choices), take_rows_reference(x, token)]
    summed = [form(y, weight, token, row, choices) for form in (sum_rows, sum_rows_reference)]
    for found, expected, inputs in ((*taken, (x,)), (*summed, (y, weight))):
        assert_close(found, expected)
        for probe in (torch.randn_like(expected), torch.ones((), dtype=torch.float64).expand_as(expected)):
            gradients = [torch.autograd.grad(out, inputs, probe, retain_graph=True) for out in (found, expected)]
            for fast, slow in zip(*gradients, strict=True):
                assert_close(fast, slow)


@pytest.mark.parametrize("choices", [1, 2])
def test_gradcheck(choices: int) -> None:
    token, row = listed(3, choices)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3 * choices, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3 * choices, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: take_rows(a, token, row, choices), (x,))
    assert torch.autograd.gradcheck(lambda a, b: sum_rows(a, b, token, row, choices), (y, weight))
    assert torch.autograd.gradgradcheck(lambda a: take_rows(a, token, row, choices).sin(), (x,))
    assert torch.autograd.gradgradcheck(lambda a, b: sum_rows(a, b, token, row, choices), (y, weight))


def test_an_expanded_input_and_weights_apart() -> None:
    token, row = listed(4, 2)
    y = torch.randn(1, 3, dtype=torch.float64).expand(8, 3).requires_grad_()
    weight = torch.rand(4, 2, dtype=torch.float64).t().reshape(-1)[::1].requires_grad_()
    found, expected = (form(y, weight, token, row, 2) for form in (sum_rows, sum_rows_reference))
    assert_close(found, expected)
    for fast, slow in zip(
        torch.autograd.grad(found.sum(), (y, weight)), torch.autograd.grad(expected.sum(), (y, weight)), strict=True
    ):
        assert_close(fast, slow)
