"""Backward passes that have no gradient of their own: they say so."""

from __future__ import annotations

import torch


def refuse_second_order(name: str, twin: str) -> None:
    """Called first in such a backward pass: refuse `create_graph=True`.

    torch's `once_differentiable` says nothing where other paths lead to the same tensor: this one would be left out.

    Args:
        name: whose gradient it is.
        twin: what to take instead.

    Raises:
        RuntimeError: the gradient is to have a gradient.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"the gradient of {name} has no gradient: got create_graph=True. Take {twin}.")
