"""The benchmark of a layer: what it calls the products alone are the products of a sparse layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_module import module_of

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    with module_of(FOLDER / "layer.py") as module:
        yield module


@pytest.mark.parametrize("k", [1, 2])
def test_products_alone(script: ModuleType, k: int) -> None:
    """Result and gradients of two matrices an expert, of every row once; nothing of experts without rows."""
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    arm = script.Products(6, 9, k, x)
    out, _ = arm(x.requires_grad_())
    out.sum().backward()
    rows = 0
    for (r, v, h), (_, w, o), (g, _, dh), (_, _, dw), (_, _, dr), (_, _, dv) in zip(
        arm.forwards[::2], arm.forwards[1::2], *(arm.backwards[n::4] for n in range(4)), strict=True
    ):
        r, v, w = (tensor.clone().requires_grad_() for tensor in (r, v, w))
        wanted = r @ v @ w
        wanted.backward(g)
        torch.testing.assert_close((h @ w, o), (wanted, wanted))
        torch.testing.assert_close((dr, dv, dw), (r.grad, v.grad, w.grad))
        assert dh.shape == h.shape
        rows += len(r)
    assert rows == 7 * k
