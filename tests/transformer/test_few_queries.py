"""The form of attention for decoding on a CPU against torch's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.transformer.few_queries import added_mask, attend, suits


def masks(rows: int, heads: int, queries: int, keys: int) -> dict[str, Tensor | None]:
    seen = torch.rand(rows, 1, 1, keys) > 0.3
    seen[0] = False  # a row that sees nothing
    return {
        "none": None,
        "bool": seen,
        "all queries": torch.rand(rows, heads, queries, keys) > 0.3,
        "bias": torch.randn(heads, queries, keys, dtype=torch.float64),
    }


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("sizes", [(3, 2, 1, 7, 8), (2, 4, 4, 5, 3), (1, 1, 8, 1, 2), (0, 2, 1, 3, 4)])
def test_it_equals_the_kernel(sizes: tuple[int, ...], scale: float | None) -> None:
    torch.manual_seed(0)
    rows, heads, queries, keys, channels = sizes
    query = torch.randn(rows, heads, queries, channels, dtype=torch.float64)
    key = torch.randn(rows, heads, channels, keys, dtype=torch.float64).transpose(2, 3)
    value = torch.randn(keys, rows, heads, channels, dtype=torch.float64).permute(1, 2, 0, 3)
    for name, mask in masks(max(rows, 1), heads, queries, keys).items():
        mask = mask if mask is None or rows or name == "bias" else mask[:0]
        found = attend(query, key, value, mask, scale)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_mask_that_is_added(queries: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, 2, n, 8, dtype=torch.float64) for n in (queries, 5, 5))
    mask = torch.rand(4, 1, 1, 5) > 0.5
    mask[1], mask[2] = True, False  # one row sees all, one nothing
    added, shown = added_mask(mask, 2, value)
    assert added.shape == (4, 2, 1, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, shown, added, None), expected, rtol=1e-10, atol=1e-10)
    assert not expected[2].any()


@pytest.mark.parametrize("places", [1, 3])
def test_a_row_of_padding_beside_a_bias(places: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, places, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 2, places, places, dtype=torch.float64)
    bias[1] = -torch.inf
    bias[2, ..., 1:] = -torch.inf
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(attend(query, key, value, bias, None), expected, rtol=1e-10, atol=1e-10)
    assert not expected[1].any()


def test_where_it_is_used() -> None:
    query = torch.zeros(2, 2, 4, 8)
    assert not suits(query)  # gradients may be wanted
    with torch.no_grad():
        assert suits(query)
        assert not suits(query.bfloat16())
        assert not suits(torch.zeros(2, 2, 9, 8))
        assert not suits(query.to("meta"))
