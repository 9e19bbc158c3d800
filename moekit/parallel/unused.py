"""Gradients of weights that a rank did not use: zeros, which must be summed with the other ranks' all the same.

A rank may meet no token of a kind. `fully_shard` sums what has a gradient; were that not the same on all ranks, their
collectives would not fit together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

NATIVE = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether torch does it: from 2.13 on."""


def reduce_unused_gradients(unit: Any) -> None:
    """Let the weights of a unit that was wrapped by `fully_shard` have gradients on every rank, zeros if need be."""
    if NATIVE:
        unit.set_reduce_scatter_unused_params(True, recurse=False)
        return
    state: Any = fully_shard.state(unit)  # type: ignore[attr-defined]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            _fill_before_reducing(group)


def _fill_before_reducing(group: Any) -> None:
    reduce = group.post_backward

    def post_backward(*args: Any) -> None:
        if group.reduce_grads:
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is None or not whole.requires_grad:
                    continue
                if whole.grad is None and parameter.unsharded_accumulated_grad is None:
                    whole.grad = torch.zeros_like(whole)
        reduce(*args)

    group.post_backward = post_backward
