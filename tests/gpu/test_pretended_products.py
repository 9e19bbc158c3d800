"""The grouped product on a GPU: sizes that torch's kernel refuses, gradients that it gets wrong, counts on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import EVERY, gpu
from torch import Tensor

from moekit.experts import GroupedGLU, GroupedMLP
from moekit.kernels import grouped_mm, grouped_mm_reference, on_host, remember, repeat_rows, split_counts
from moekit.testing import assert_close

COUNTS = {"even": [2, 2, 2], "one without": [3, 0, 2], "only the last": [0, 0, 4], "one expert": [5], "none": [0, 0]}
SIZES = [(8, 16), (12, 8), (16, 42), (12, 42), (5, 7), (8, 4), (4, 8)]


def gradients(product: Any, x: Tensor, weight: Tensor, counts: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = product(x, weight, counts)
    probe = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * probe).sum(), (x, weight))]


@EVERY
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_the_reference(counts: list[int], size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Any size, with experts without a row: their gradient is zero, whatever the kernel leaves there."""
    x, weight = torch.randn(sum(counts), size[0]).to(dtype), torch.randn(len(counts), *size).to(dtype)
    wanted = gradients(grouped_mm_reference, x, weight, torch.tensor(counts))
    with gpu(device):
        got = gradients(grouped_mm, x.to("cuda"), weight.to("cuda"), torch.tensor(counts, device="cuda"))
        got = [t.detach().cpu() for t in got]
    for name, one, other in zip(("output", "x", "weight"), got, wanted, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, name)


@EVERY
def test_an_expanded_gradient_and_matrices_that_lie_elsewhere(device: str) -> None:
    counts, x = [2, 0, 3], torch.randn(5, 8).bfloat16()
    stacked = torch.randn(3, 2, 8, 16).bfloat16()  # as BASELayerStack keeps its blocks
    wide = torch.randn(3, 9, 16).bfloat16()
    forms = {
        "block of a stack": lambda t: t[0].unbind(1)[1],
        "transposed": lambda t: t[0][:, 0].transpose(1, 2).contiguous().transpose(1, 2),
        "from the second row": lambda t: t[1][:, 1:],
        "at an odd address": lambda t: t[1].flatten()[3 : 3 + 3 * 8 * 16].view(3, 8, 16),
        "every second column": lambda t: t[1][:, :8, ::2],
    }
    for form, take in forms.items():
        weight = take((stacked, wide))
        wanted = grouped_mm_reference(x.float(), weight.float(), torch.tensor(counts)).bfloat16()
        with gpu(device):
            there = take((stacked.to("cuda"), wide.to("cuda"))).detach().requires_grad_()
            rows = x.to("cuda").requires_grad_()
            out = grouped_mm(rows, there, torch.tensor(counts, device="cuda"))
            out.sum().backward()  # an expanded gradient, which aten's backward refuses
            assert rows.grad is not None
            assert there.grad is not None
            assert not there.grad[1].cpu().any()
            assert_close(out.cpu(), wanted, form)
    with gpu(device):
        rows = torch.randn(40, device="cuda").bfloat16()[3:35].view(4, 8)
        assert grouped_mm(rows, stacked.to("cuda")[:, 0], torch.tensor([1, 1, 2], device="cuda")).shape == (4, 16)


@EVERY
def test_banks_of_any_hidden_size(device: str) -> None:
    """GroupedGLU's own advice, 2 F / 3, is seldom a multiple of 8."""
    for bank in (GroupedGLU(3, 16, 2 * 64 // 3), GroupedMLP(3, 12, 20, bias=True)):
        bank = bank.bfloat16()
        counts, rows = torch.tensor([2, 0, 3]), torch.randn(5, bank.dim).bfloat16()
        wanted = bank(rows, counts)
        with gpu(device):
            there = bank.to("cuda")
            out = there(rows.to("cuda"), counts.to("cuda"))
            out.sum().backward()
            assert_close(out.cpu(), wanted)
            assert all(p.grad is not None for p in there.parameters())


@pytest.mark.parametrize("rows", [3, 40, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_few_rows_need_no_count_where_no_gradient_is_wanted(dtype: torch.dtype, rows: int) -> None:
    counts = torch.bincount(torch.randint(0, 7, (rows,)), minlength=8)  # the last expert has none
    x, weight = torch.randn(rows, 12).to(dtype), torch.randn(8, 12, 20).to(dtype)
    wanted = grouped_mm_reference(x.float(), weight.float(), counts).to(dtype)
    with gpu() as found, torch.no_grad():
        there = x.to("cuda"), weight.to("cuda"), counts.to("cuda")
        with found.watch() as waits:
            out = grouped_mm(*there)
        assert_close(out.cpu(), wanted)
    assert sum(waits.values()) == (rows > 256)


def test_counts_that_do_not_fit_are_refused_there_too() -> None:
    with gpu():
        x, weight = torch.randn(5, 4, device="cuda"), torch.randn(2, 4, 4, device="cuda").requires_grad_()
        with pytest.raises(ValueError, match="one count per matrix"):
            grouped_mm(x, weight, torch.tensor([2, 2], device="cuda"))


def test_counts_are_read_once() -> None:
    with gpu() as found:
        counts = torch.tensor([2, 0, 3, 1], device="cuda")
        with found.watch() as waits:
            assert on_host(counts).tolist() == [2, 0, 3, 1]
            parts = split_counts(counts, [3, 1])
            assert [on_host(part).tolist() for part in parts] == [[2, 0, 3], [1]]
            told = remember(torch.full((1,), 7, device="cuda"), torch.tensor([7]))
            assert on_host(told).item() == 7
        assert sum(waits.values()) == 1
        del counts, parts, told
    here = torch.tensor([1, 2])
    assert on_host(here) is here


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_rows_have_gradients_of_float32_sums(dtype: torch.dtype, device: str) -> None:
    """CUDA's scattered addition is in any order and in the type of the values; bf16 stops at 256 times a summand."""
    counts, values = torch.tensor([3, 0, 2000, 4]), torch.randn(4, 6).to(dtype)
    gradient = torch.rand(2007, 6).to(dtype) + 0.5
    wanted = torch.stack([part.double().sum(0) for part in gradient.split(counts.tolist())])
    with gpu(device) as found:
        there = values.to("cuda").requires_grad_()
        numbers, grad = counts.to("cuda"), gradient.to("cuda")
        with found.watch() as waits:
            out = repeat_rows(there, numbers, 2007)
            seen = {out.grad_fn.name()}
            out.backward(grad)
        assert not waits
        assert seen == {"_RepeatBackward"}  # and not the scattered addition behind an index
        assert there.grad is not None
        assert there.grad.dtype == dtype
        assert torch.equal(out.detach().cpu(), values.repeat_interleave(counts, 0))
        got = there.grad.cpu().double()
    torch.testing.assert_close(got, wanted, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=0)
