"""The grouped product against its reference: outputs, gradients, types, odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.kernels import grouped_mm, grouped_mm_reference
from moekit.kernels import grouped_mm as exported
from moekit.testing import assert_close

module = __import__("sys").modules["moekit.kernels.grouped_mm"]

D, F = 5, 7
COUNTS = {
    "even": [2, 2, 2],
    "expert 1 has no row": [3, 0, 2],
    "only the last": [0, 0, 4],
    "first and last without": [0, 5, 0],
    "one expert": [6],
    "no row": [0, 0],
}


def case(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(sum(counts), D, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), D, F, dtype=dtype, requires_grad=True)
    return x, weight, torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_reference(counts: list[int], dtype: torch.dtype) -> None:
    x, weight, count = case(counts, dtype)
    results = []
    for product in (grouped_mm, grouped_mm_reference):
        out = product(x, weight, count)
        probe = torch.cos(torch.arange(out.numel(), dtype=dtype)).view(out.shape)
        results.append((out, *torch.autograd.grad((out * probe).sum(), (x, weight))))
    for name, fast, slow in zip(("output", "x", "weight"), *results, strict=True):
        assert fast.dtype == dtype
        assert_close(fast, slow, name)


def test_an_expert_without_rows_gets_a_gradient_of_zeros() -> None:
    x, weight, counts = case([3, 0, 2])
    (grad,) = torch.autograd.grad(grouped_mm(x, weight, counts).sum(), weight)
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()


@pytest.mark.parametrize("counts", [[3, 0, 2], [1]], ids=str)
def test_gradcheck(counts: list[int]) -> None:
    x, weight, count = case(counts)
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, count), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, count).sin(), (x, weight))
    turned = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, count).sin(), (x, turned))


def test_expanded_and_non_contiguous() -> None:
    """A gradient of stride 0 (``out.sum()``), transposed rows, transposed matrices."""
    counts = torch.tensor([2, 0, 3])
    x = torch.randn(D, 5, dtype=torch.float64).t().requires_grad_()
    weight = torch.randn(3, F, D, dtype=torch.float64).transpose(1, 2).requires_grad_()
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    fast, slow = grouped_mm(x, weight, counts), grouped_mm_reference(x, weight, counts)
    assert_close(fast, slow)
    for a, b in zip(
        torch.autograd.grad(fast.sum(), (x, weight)), torch.autograd.grad(slow.sum(), (x, weight)), strict=True
    ):
        assert_close(a, b)
    transposed = torch.randn(F, 5, dtype=torch.float64).t()
    for a, b in zip(
        torch.autograd.grad(grouped_mm(x, weight, counts), (x, weight), transposed),
        torch.autograd.grad(grouped_mm_reference(x, weight, counts), (x, weight), transposed),
        strict=True,
    ):
        assert_close(a, b)


def test_only_the_gradient_that_is_asked_for() -> None:
    x, weight, counts = case([2, 3])
    assert grouped_mm(x.detach(), weight, counts).sum().backward() is None
    assert weight.grad is not None
    grouped_mm(x, weight.detach(), counts).sum().backward()
    assert x.grad is not None


def test_half_precision_is_multiplied_in_float32_where_the_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rows: one rounding at the end, as if all had been float32."""
    monkeypatch.setattr(module, "_multiplies_in_float32", lambda dtype: dtype == torch.bfloat16)
    multiplied, mm = set(), torch.mm

    def recording(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        multiplied.update((a.dtype, b.dtype, out.dtype))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", recording)
    x, weight, counts = case([40, 0, 24], torch.bfloat16)
    out = grouped_mm(x, weight, counts)
    wide_x, wide_weight = (t.detach().float().requires_grad_() for t in (x, weight))
    wide = grouped_mm_reference(wide_x, wide_weight, counts)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wide.bfloat16())
    grad = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, (x, weight), grad),
        torch.autograd.grad(wide, (wide_x, wide_weight), grad.float()),
        strict=True,
    ):
        assert torch.equal(found, expected.bfloat16())
    assert multiplied == {torch.float32}


def test_half_precision_as_the_machine_is() -> None:
    x, weight, counts = case([40, 0, 24], torch.bfloat16)
    wide = grouped_mm_reference(x.float(), weight.float(), counts)
    assert_close(grouped_mm(x, weight, counts), wide)


def test_slow_half_precision_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = module._multiplies_in_float32.__wrapped__
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert slow(torch.bfloat16)
    assert not slow(torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert not slow(torch.bfloat16)


def test_autocast() -> None:
    x, weight, counts = case([4, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_mm(x, weight, counts)
        exact = grouped_mm(x.double(), weight.double(), counts)
    assert out.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    assert_close(out, grouped_mm_reference(x, weight, counts))
    out.float().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0]], ids=str)
def test_custom_op_keeps_its_promises(counts: list[int]) -> None:
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    x, weight, count = case(counts, torch.float32)
    torch.library.opcheck(module._grouped_mm, (x, weight, count))
    rows, grads = x.detach(), torch.randn(sum(counts), F)
    torch.library.opcheck(module._grouped_outer, (rows, grads, count))


def test_counts_must_fit() -> None:
    x, weight, _ = case([3, 2])
    for wrong in ([3, 1], [3, 3], [5], [3, 2, 0], [6, -1]):
        with pytest.raises(ValueError, match="one count per matrix, none negative, that sum to the number of rows"):
            exported(x, weight, torch.tensor(wrong))
