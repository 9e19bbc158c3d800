"""The pretended GPU itself: what it refuses, what it counts, and that its numbers are the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moekit.testing.pretended_gpu import DeviceMixError, pretended_gpu


def test_it_says_cuda_and_computes_as_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    model(x).sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with pretended_gpu() as gpu:
        there = copy.deepcopy(model).to("cuda")
        data = x.to("cuda")
        with gpu.watch() as waits:
            out = there(data)
            out.sum().backward()
        assert not waits
        assert {str(p.device) for p in there.parameters()} == {str(out.device)} == {"cuda:0"}
        assert out.is_cuda
        for parameter, gradient in zip(there.parameters(), wanted, strict=True):
            assert torch.equal(parameter.grad.cpu(), gradient)
    assert torch.tensor([1.0]).cpu().device.type == "cpu"


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu():
        x = torch.randn(4, 3, device="cuda")
        with pytest.raises(DeviceMixError, match=r"on the CPU of shapes \[\(3,\)\]"):
            x + torch.zeros(3)
        assert (x + torch.tensor(1.0)).is_cuda  # a scalar may be the host's
        with pytest.raises(DeviceMixError, match="index_select"):
            x.index_select(0, torch.tensor([0]))
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_it_counts_where_the_host_waits() -> None:
    with pretended_gpu() as gpu:
        x = torch.arange(6.0, device="cuda")
        for act in (
            lambda: int(x.sum()),
            lambda: bool(x[0] > 0),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.nonzero(),
            lambda: x[x > 2],
            lambda: x.index_put((x > 2,), x[0]),
            lambda: torch.multinomial(x, 1),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: torch.ones(3).to("cuda"),
            lambda: torch.ones(3).to("cuda", non_blocking=True),  # from memory that is not pinned
            lambda: x.repeat_interleave(x.long()),
        ):
            with gpu.watch() as waits:
                act()
            assert sum(waits.values()) == 1, act
        for act in (
            lambda: x.sum() + 1,
            lambda: x[x.long()],
            lambda: torch.where(x > 2, x, 0.0),
            lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
            lambda: torch.zeros(3, device="cuda"),
            lambda: x.repeat_interleave(x.long(), output_size=15),
        ):
            with gpu.watch() as waits:
                act()
            assert not waits, act
    with pretended_gpu() as gpu, torch.inference_mode(), gpu.watch() as waits:
        assert int(torch.ones(3, device="cuda").sum()) == 3
    assert sum(waits.values()) == 1


def test_a_wait_names_its_line() -> None:
    from moekit.kernels import on_host

    with pretended_gpu() as gpu, gpu.watch() as waits:
        counts = torch.ones(3, dtype=torch.int64, device="cuda")
        assert on_host(counts).sum() == 3
        on_host(counts)
    (wait,) = waits
    assert wait.file == "kernels/host_counts.py"
    assert "counts.cpu()" in wait.source


def test_grouped_products_are_held_against_the_kernels_rules() -> None:
    ends = torch.tensor([2, 5], dtype=torch.int32)
    with pretended_gpu():
        w = torch.randn(2, 8, 16, dtype=torch.bfloat16).to("cuda")
        x = torch.randn(5, 8, dtype=torch.bfloat16).to("cuda")
        assert F.grouped_mm(x, w, offs=ends.to("cuda")).shape == (5, 16)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            F.grouped_mm(x[:, :4].contiguous(), w[:, :4], offs=ends.to("cuda"))
        empty = torch.tensor([0, 5], dtype=torch.int32).to("cuda")
        # As a kernel may leave it: nobody wrote there.
        assert F.grouped_mm(x.t(), torch.randn(5, 8, dtype=torch.bfloat16).to("cuda"), offs=empty)[0].isnan().all()


def test_it_ends() -> None:
    with pretended_gpu():
        left = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="after the end"):
        left + 1
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")


def test_autocast_gives_operators_their_types() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
    with pretended_gpu():
        there = copy.deepcopy(model).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            hidden = there[0](x.to("cuda"))
            assert hidden.dtype == torch.bfloat16
            assert there[1](hidden).dtype == hidden.softmax(-1).dtype == hidden.sum().dtype == torch.float32
            assert F.scaled_dot_product_attention(*(hidden[None, None].float(),) * 3).dtype == torch.bfloat16
            assert torch.cat([hidden, hidden.float()]).dtype == torch.float32
            out = there(x.to("cuda"))
        assert there(x.to("cuda")).dtype == torch.float32
        out.float().sum().backward()
        assert there[0].weight.grad.dtype == torch.float32
        torch.testing.assert_close(out.cpu(), wanted, rtol=2e-2, atol=2e-2)
