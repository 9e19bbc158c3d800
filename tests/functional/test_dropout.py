"""Dropout by comparison of uniform draws."""

from __future__ import annotations

import math

import pytest
import torch

from moekit.functional.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_share_scale_and_gradient(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(0)
    x = torch.full((200, 300), 2.0, dtype=dtype, requires_grad=True)
    kept = dropout(x, probability, training=True)
    assert kept.dtype == dtype
    zero = kept == 0
    share = float(zero.double().mean())
    assert abs(share - probability) < 6 * math.sqrt(probability * (1 - probability) / x.numel())
    scale = 1 / (1 - probability)
    torch.testing.assert_close(kept[~zero], torch.full_like(kept[~zero], 2 * scale))
    kept.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, zero)
    torch.testing.assert_close(x.grad[~zero], torch.full_like(x.grad[~zero], scale))
    # Entries are independent of their neighbours in both directions.
    centred = zero.double() - probability
    variance = probability * (1 - probability)
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs(float((a * b).mean()) / variance) < 6 / math.sqrt(a.numel())


def test_nothing_happens_outside_of_training() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert not dropout(x, 1.0, training=True).any()
