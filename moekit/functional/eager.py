"""Whether operations are merely run, so that another way to the same numbers may be taken."""

from __future__ import annotations

import torch


def is_eager() -> bool:
    """Whether nobody compiles, transforms or records the operations that follow.

    False in a graph of `torch.compile` or `torch.export`, inside a transformation of `torch.func`, whose batched
    tensors have no numbers to be read, and under a dispatch mode: `make_fx` would keep numbers that are read as
    constants, and a counter of operations must see the same ones with and without gradients.
    """
    return not (is_symbolic() or torch._C._len_torch_dispatch_stack())


def is_symbolic() -> bool:
    """Whether no number may be read: in a graph that is compiled or exported, and inside a transformation."""
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Whether a transformation of `torch.func` (vmap, grad, jvp, ...) sees the operations that follow.

    It takes an `autograd.Function` only where that says how, and no operation that writes into another's result.
    """
    return bool(torch._C._are_functorch_transforms_active())
