"""What torch itself counts, on the meta device: the formulas' judge, and the way for models they do not know."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

_MEASURED = 0.3  # seconds
_FEWEST = 4  # products, the first of which warms up


@dataclass(frozen=True)
class Measured:
    """What a forward does.

    Attributes:
        parameters: numbers to learn.
        flops: floating-point operations of the forward that torch knows how to count: matrix products, attention,
            convolutions, and moekit's grouped product.
        kept: bytes that autograd keeps for backward, parameters left out, each storage once.
    """

    parameters: int
    flops: int
    kept: int


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product here, the median of some; measured once, in under a second.

    Args:
        device: "cpu" or "cuda".
        dtype: number format of both factors.
    """
    size = 8192 if device == "cuda" else 768
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)  # draws no random number: a run's are its own
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    end = time.perf_counter() + _MEASURED
    with torch.no_grad():
        while len(times) < _FEWEST or time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            torch.mm(a, a)
            wait()
            times.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(times[1:])


def measure(module: nn.Module, *inputs: Any, **named: Any) -> Measured:
    """Run one forward of `module` on the meta device, where tensors have shapes and no contents, and count.

    Nothing is computed and no memory is taken, so models of any size can be measured. A forward that looks at the
    contents of a tensor (a boolean index, a loop over counts) cannot run there and raises torch's error.

    Args:
        module: any module; it is not changed.
        *inputs: what its forward takes; tensors may be anywhere.
        **named: the same, by name.

    Example:
        >>> measure(nn.Linear(3, 4), torch.zeros(5, 3))
        Measured(parameters=16, flops=120, kept=60)
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    state = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in tensors.items()}
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept.setdefault(key, tensor)  # holds it, so that no other storage gets its address
        return tensor

    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (inputs, named))
    counter = flop_counter()
    with torch.enable_grad(), counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = torch.func.functional_call(module, state, args, kwargs)
    del output
    return Measured(
        parameters=sum(p.numel() for p in module.parameters()),
        flops=int(counter.get_total_flops()),
        kept=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    )


def flop_counter() -> FlopCounterMode:
    """A context that counts what torch knows how to count, and moekit's grouped product."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.moekit.grouped_mm: grouped_flops})


def grouped_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 R D F of the rows, whichever experts they belong to."""
    return 2 * x[0] * weight[1] * weight[2]
