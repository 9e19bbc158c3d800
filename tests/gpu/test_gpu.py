"""What only a GPU can show: layouts over nccl, exact resume, kernels at real sizes. ``pytest -m gpu`` runs it all.

The other modules of this folder run there too, by the parameter ``real``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import NEEDS_GPU

import moekit as mk
from moekit import experts, routers
from moekit.kernels import grouped_mm, grouped_mm_reference
from moekit.routing import Capacity

PROGRAM = Path(__file__).with_name("gpu_program.py")
ON_GPU = [pytest.mark.gpu, NEEDS_GPU]


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=ON_GPU)])
@pytest.mark.parametrize("what", ["layouts", "resume"])
@pytest.mark.slow
def test_training(what: str, accelerator: str) -> None:
    """On one device with one process, over nccl where it is a GPU."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), what, accelerator], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_grouped_products_at_real_sizes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([700, 0, 1, 333, 128, 0, 1000, 14])
    x = torch.randn(int(counts.sum()), 512).to(dtype)
    weight = (torch.randn(8, 512, 1366) / 512**0.5).to(dtype)
    found = []
    for product, device, kind in ((grouped_mm, "cuda", dtype), (grouped_mm_reference, "cpu", torch.float32)):
        a, b = (t.to(device, kind).requires_grad_() for t in (x, weight))
        out = product(a, b, counts.to(device))
        out.float().square().sum().backward()
        found.append([t.detach().float().cpu() for t in (out, a.grad, b.grad) if t is not None])
    tolerance = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}[dtype]  # float32: TF32 may be on
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance
    assert not found[0][2][1].any()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gated", "two-layer", "biases"])
def test_layers_by_triton_at_real_sizes(kind: str, dtype: torch.dtype) -> None:
    """Against torch: outputs, losses, gradients; and two runs of them are equal to the last bit."""
    bank: Any = {
        "gated": lambda: experts.GroupedGLU(16, 520, 682, activation="silu"),
        "two-layer": lambda: experts.GroupedMLP(16, 520, 1030, activation="gelu"),
        "biases": lambda: experts.GroupedMLP(16, 520, 1030, bias=True),
    }[kind]
    torch.manual_seed(0)
    capacity = None if kind == "biases" else Capacity(1.0, 1.0)
    layer = mk.MoELayer(routers.TopKRouter(520, 16, 3, capacity=capacity), bank()).to("cuda", dtype)
    x = torch.randn(2048, 520, device="cuda", dtype=dtype)
    found = []
    for backend in ("triton", "triton", "torch"):
        mk.use_backend(layer, backend)  # type: ignore[arg-type]
        rows = x.clone().requires_grad_()
        hidden, routing = layer(rows)
        loss = hidden.float().square().sum() + routing.losses["router_z"] + routing.losses["load_balance"]
        grads = torch.autograd.grad(loss, [rows, *layer.parameters()])
        found.append(
            [hidden.detach(), routing.expert, routing.position, routing.losses["load_balance"].detach(), *grads]
        )
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    tolerance = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    for one, other in zip(found[0], found[2], strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("kind", ["packed", "padded", "expert choice"])
def test_two_runs_are_equal_to_the_last_bit(kind: str) -> None:
    made: Any = {
        "packed": lambda: routers.TopKRouter(64, 8, 4),
        "padded": lambda: routers.TopKRouter(64, 8, 4, capacity=Capacity(1.0, 1.0)),
        "expert choice": lambda: routers.ExpertChoiceRouter(64, 8, capacity_factor=4.0),
    }[kind]
    torch.manual_seed(0)
    layer = mk.MoELayer(made(), experts.GroupedMLP(8, 64, 128)).to("cuda")
    x = torch.randn(2048, 64, device="cuda")
    results = []
    for _ in range(4):
        rows = x.clone().requires_grad_()
        out = layer(rows).hidden
        out.square().sum().backward()
        assert rows.grad is not None
        results.append((out.detach(), rows.grad))
    assert all(torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1]) for out, grad in results)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_layer_waits_for_nothing() -> None:
    """Padded, and packed without padding where the product is one kernel: torch itself says where the host waits."""
    padded = mk.MoELayer(routers.gshard(64, 8), experts.GroupedMLP(8, 64, 128)).to("cuda", torch.bfloat16)
    packed = mk.MoELayer(routers.TopKRouter(64, 8, 2), experts.GroupedGLU(8, 64, 170)).to("cuda", torch.bfloat16)
    x = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    layers = [padded, packed] if torch.cuda.get_device_capability()[0] in (9, 10) else [padded]
    for layer in layers:
        layer(x).hidden.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in layers:
            layer(x).hidden.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
