"""Triton where it is installed, and the one place from which its kernels are started.

Triton comes with torch's CUDA build on Linux. Everything of this folder imports without it: `jit` then leaves a
function as it is, and nobody starts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "PRESENT",
    "ceil_div",
    "float32_products",
    "is_interpreted",
    "jit",
    "launch",
    "power_of_two",
    "tl",
    "widened",
]

PRESENT = triton is not None


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit` where there is Triton."""
    return triton.jit(kernel) if PRESENT else kernel


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: its own setting, read when they were made."""
    return PRESENT and not isinstance(_probe, triton.runtime.JITFunction)


@jit
def _probe() -> None:
    pass


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """Start a kernel on the device of its first tensor; nothing happens for an empty grid.

    Args:
        kernel: made by `jit`.
        grid: number of programs in up to three dimensions.
        *arguments: tensors and numbers, in the kernel's order.
        warps: number of warps of a program.
        stages: how many tiles a loop loads ahead.
        **constants: its ``tl.constexpr`` arguments.
    """
    if not all(grid):
        return
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, **constants)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def widened() -> bool:
    """Whether factors of a product must be float32 first: the interpreter multiplies the bits of bf16 as integers."""
    return is_interpreted()


def float32_products() -> str:
    """How float32 is multiplied: TF32 where the program has allowed it to torch's own products, else exactly."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
