"""Positions and norms against their formulas, written out."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from moekit.transformer import (
    LayerNorm,
    Positions,
    RelativePositions,
    RMSNorm,
    RMSNormWithoutScale,
    RotaryPositions,
    SinusoidalPositions,
)
from moekit.transformer.positions import relative_bucket


def literal_bucket(offset: int, two_sided: bool, num_buckets: int, max_distance: int) -> int:
    """T5's rule for one pair: offset = key position - query position."""
    start = 0
    if two_sided:
        num_buckets //= 2
        if offset > 0:
            start = num_buckets
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = num_buckets // 2
    if distance < exact:
        return start + distance
    # 1e-9: the logarithms of powers of two must not fall just short of a whole number.
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return start + min(exact + math.floor(share * (num_buckets - exact) + 1e-9), num_buckets - 1)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3), (64, 1000)])
def test_relative_buckets(two_sided: bool, num_buckets: int, max_distance: int) -> None:
    offset = torch.arange(-1200, 1201)
    found = relative_bucket(offset, two_sided=two_sided, num_buckets=num_buckets, max_distance=max_distance)
    assert found.tolist() == [literal_bucket(int(o), two_sided, num_buckets, max_distance) for o in offset]
    assert set(found.tolist()) == set(range(num_buckets)) - ({num_buckets // 2} if two_sided else set())


def test_relative_bias_looks_the_table_up() -> None:
    torch.manual_seed(0)
    positions = RelativePositions(3)
    torch.nn.init.normal_(positions.weight)
    query, key = torch.arange(5, 9), torch.arange(9)
    for causal in (False, True):
        bias = positions.bias(query, key, causal=causal)
        assert bias.shape == (3, 4, 9)
        for h in range(3):
            for i, q in enumerate(query.tolist()):
                for j, k in enumerate(key.tolist()):
                    bucket = literal_bucket(k - q, not causal, 32, 128)
                    assert bias[h, i, j] == positions.weight[bucket, h]


@pytest.mark.parametrize("buckets", [(6, 128), (2, 128), (32, 16)])
def test_impossible_buckets_are_refused(buckets: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="RelativePositions need num_buckets"):
        RelativePositions(2, num_buckets=buckets[0], max_distance=buckets[1])


def test_rotation_is_a_product_of_complex_numbers() -> None:
    torch.manual_seed(1)
    channels, place = 6, torch.tensor([0, 1, 7, 300])
    x = torch.randn(2, 4, 3, channels, dtype=torch.float64)
    rotation = RotaryPositions(base=50.0).rotation(place, channels)
    turned = rotation.apply(x)
    half = channels // 2
    for i, p in enumerate(place.tolist()):
        for c in range(half):
            turn = cmath.exp(1j * p * 50.0 ** (-2 * c / channels))
            for b in range(2):
                for h in range(3):
                    value = complex(x[b, i, h, c], x[b, i, h, c + half]) * turn
                    found = complex(turned[b, i, h, c], turned[b, i, h, c + half])
                    assert abs(value - found) < 1e-4  # angles are float32


def test_rotated_products_depend_on_distances_only() -> None:
    torch.manual_seed(2)
    query, key = torch.randn(8), torch.randn(8)

    def product(q: int, k: int) -> float:
        rotation = RotaryPositions().rotation(torch.tensor([q, k]), 8)
        both = rotation.apply(torch.stack((query, key))[None, :, None, :])
        return float(both[0, 0, 0] @ both[0, 1, 0])

    assert product(3, 1) == pytest.approx(product(13, 11), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(1, 3), abs=1e-2)


def test_odd_heads_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="even head dimension: got 5"):
        RotaryPositions().rotation(torch.arange(3), 5)


@pytest.mark.parametrize("dim", [8, 7])
def test_sinusoids(dim: int) -> None:
    place = torch.tensor([0, 1, 5, 99])
    found = SinusoidalPositions().embed(torch.zeros(2, 4, dim), place)
    for i, p in enumerate(place.tolist()):
        for c in range(dim):
            angle = p / 10_000 ** ((c - c % 2) / dim)
            expected = math.cos(angle) if c % 2 else math.sin(angle)
            assert float(found[1, i, c]) == pytest.approx(expected, abs=2e-5)


def test_no_positions_do_nothing() -> None:
    x, place = torch.randn(1, 3, 4), torch.arange(3)
    positions = Positions()
    assert positions.embed(x, place) is x
    assert positions.rotation(place, 4) is None
    assert positions.bias(place, place, causal=True) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_against_their_formulas(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = (torch.randn(3, 5, 8) * 4 + 2).to(dtype)
    layer, rms = LayerNorm(8).to(dtype), RMSNorm(8).to(dtype)
    for norm in (layer, rms):
        torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(layer.bias)
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = expected * layer.weight.double() + layer.bias.double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    plain = RMSNormWithoutScale(8).to(dtype)
    assert list(plain.parameters()) == []
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert plain(x).dtype == dtype
    torch.testing.assert_close(plain(x).double(), expected, rtol=tolerance, atol=tolerance)
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight.double()
    assert rms(x).dtype == dtype
    torch.testing.assert_close(rms(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_statistics_are_float32_under_bf16() -> None:
    """512 values whose squares sum to more than bf16 can count: its statistics would be visibly off.

    Weights in bf16 too, as in bf16-true, and in float32, as under autocast.
    """
    torch.manual_seed(4)
    x = (torch.randn(4, 512) + 100).bfloat16()
    exact = x.float()
    for norm, expected in (
        (LayerNorm(512).bfloat16(), torch.nn.functional.layer_norm(exact, (512,))),
        (RMSNorm(512).bfloat16(), torch.nn.functional.rms_norm(exact, (512,), eps=1e-6)),
        (RMSNormWithoutScale(512).bfloat16(), torch.nn.functional.rms_norm(exact, (512,), eps=1e-6)),
    ):
        torch.testing.assert_close(norm(x), expected.bfloat16(), rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(norm.float()(x), expected.bfloat16(), rtol=8e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(512)(exact).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_norms_without_gradients_are_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=dtype) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None].to(dtype)
    x[0, 0] = 0.0
    norm = RMSNorm(16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    expected = norm(x)
    assert expected.requires_grad
    with torch.no_grad():
        found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.detach())
