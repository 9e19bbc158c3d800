"""Scores are wide whatever is around them."""

from __future__ import annotations

import pytest
import torch

from moekit.functional import float32_linear, without_autocast
from moekit.functional.precision import autocast_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_wide_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = x.to(wide) @ weight.to(wide).t()
    with torch.autocast("cpu", torch.bfloat16):
        found = float32_linear(x, weight)
    assert found.dtype == wide
    assert torch.equal(found, expected)


def test_devices_without_autocast_are_no_trouble() -> None:
    """On the meta device, whose autocast does not exist, shapes still come out."""
    assert float32_linear(torch.empty(7, 5, device="meta"), torch.empty(3, 5, device="meta")).shape == (7, 3)
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_the_type_that_autocast_turns_factors_to() -> None:
    """What torch's own product has; None where autocast is off, for float64, and on the meta device."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 2, dtype=dtype)
        assert autocast_dtype(x) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert (autocast_dtype(x) or dtype) == (x @ x).dtype
            assert (autocast_dtype(x) is None) == (dtype == torch.float64)
            assert autocast_dtype(x.to("meta")) is None
