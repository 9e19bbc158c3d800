"""How near two results must be: one table of tolerances for the whole project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Largest ratio ||actual - expected|| / ||expected|| by element type. A test never loosens it: it widens the type.
TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def assert_close(actual: Tensor, expected: Tensor, what: str = "the result", *, floor: float = 0.0) -> None:
    """Assert that two tensors are the same up to rounding: ||actual - expected|| <= tolerance * ||expected||.

    The tolerance is that of the coarser of the two types. Whole numbers and truth values must be equal. NaN and
    infinity never pass, not even beside each other.

    Args:
        actual: what was computed.
        expected: what it should be; same shape.
        what: begins the message.
        floor: least value taken for ||expected||, for a tensor that is small beside others it belongs to.

    Raises:
        AssertionError: if they differ.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)} where {tuple(expected.shape)} is expected.")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not (actual.is_floating_point() and expected.is_floating_point()):
        if not torch.equal(actual, expected):
            different = int((actual != expected).sum())
            raise AssertionError(f"{what}: {different} of {actual.numel()} entries differ.\n{_show(actual, expected)}")
        return
    tolerance = max(TOLERANCES[actual.dtype], TOLERANCES[expected.dtype])
    a, b = actual.double(), expected.double()
    for name, tensor in (("actual", a), ("expected", b)):
        if not bool(tensor.isfinite().all()):
            raise AssertionError(f"{what}: the {name} value holds NaN or infinity.\n{_show(actual, expected)}")
    error, scale = float((a - b).norm()), max(float(b.norm()), floor)
    if not error <= tolerance * scale:
        raise AssertionError(
            f"{what}: ||actual - expected|| = {error:.3g} where at most {tolerance:g} * {scale:.3g} is allowed.\n"
            f"{_show(actual, expected)}"
        )


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Assert that two sets of named results are the same up to rounding.

    Gradients that vanish in theory are rounding noise in practice: each tensor is held against its own norm or a
    thousandth of the largest norm of the set, whichever is larger.

    Raises:
        AssertionError: naming the first result that differs.
    """
    if actual.keys() != expected.keys():
        raise AssertionError(f"{what}: results {sorted(actual)} where {sorted(expected)} are expected.")
    norms = [float(t.detach().double().norm()) for t in expected.values() if t.is_floating_point()]
    floor = 1e-3 * max((n for n in norms if n < float("inf")), default=0.0)
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, f"{what}: {name}", floor=floor)


def rule(holds: Any, broken: str) -> None:
    """Assert a rule of the contract; `broken` says what was broken and what to do.

    Raises:
        AssertionError: if it does not hold. Unlike ``assert`` it also acts under ``python -O``.
    """
    if not bool(holds):
        raise AssertionError(broken)


def _show(actual: Tensor, expected: Tensor) -> str:
    return f"actual   {_few(actual)}\nexpected {_few(expected)}"


def _few(tensor: Tensor) -> str:
    flat = tensor.flatten()
    shown = ", ".join(f"{v:.6g}" for v in flat[:8].tolist())
    return f"[{shown}{', ...' if flat.numel() > 8 else ''}] {tensor.dtype}"
