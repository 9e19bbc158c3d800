"""Gradients of weights that a rank did not use: zeros, which must be summed with the other ranks' all the same.

A rank may meet no token of a kind. `fully_shard` sums what has a gradient; were that not the same on all ranks, their
collectives would not fit together. What no rank has used must have none afterwards, as in one process: an optimizer
decays a weight whose gradient is zero and moves it by its momentum, and leaves one without a gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

NATIVE = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
"""Whether torch does it: from 2.13 on."""

_used = WeakTensorKeyDictionary()
"""Of the parameters of wrapped units, whether autograd gave the gradient that they hold, on this rank."""


def parameter_groups(unit: Any) -> list[Any]:
    """The groups in which `fully_shard` keeps the parameters of a unit that it has wrapped."""
    state: Any = fully_shard.state(unit)  # type: ignore[attr-defined]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def reduce_unused_gradients(unit: Any) -> None:
    """Let the weights of a unit that was wrapped by `fully_shard` have gradients on every rank, zeros if need be."""
    if NATIVE:
        unit.set_reduce_scatter_unused_params(True, recurse=False)
    for group in parameter_groups(unit):
        _look_before_reducing(group)


def _look_before_reducing(group: Any) -> None:
    reduce = group.post_backward

    def post_backward(*args: Any) -> None:
        for parameter in group.fsdp_params:
            parameter.accumulate_unsharded_grad_if_needed()
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is None or not whole.requires_grad:
                continue
            real = whole.grad is not None or parameter.unsharded_accumulated_grad is not None
            own = parameter.sharded_param
            # Over replicas the gradients of earlier micro-batches wait in the group's buffer until they are summed.
            held = own.grad is not None or group._partial_reduce_output is not None
            _used[own] = real or (held and _used.get(own, True))
            if not real and group.reduce_grads and not NATIVE:
                whole.grad = torch.zeros_like(whole)
        reduce(*args)

    group.post_backward = post_backward


def used_somewhere(parameters: Sequence[Tensor], flag: Tensor | None = None) -> Tensor:
    """Which parameters got their gradient from autograd on some rank: Float32[len(parameters)] of zeros and ones.

    A further `flag` of this rank, Float32[1], travels with them: the last entry is whether any rank has it set.
    All ranks must ask, after the backward of a step. What is not divided by `fully_shard` counts as used.
    """
    local = [bool(_used.get(parameter, True)) for parameter in parameters]
    meshes = [parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)]
    flags = torch.tensor(local, dtype=torch.float32)
    if meshes and meshes[0].device_type == "cuda":
        # From pinned memory: the host goes on, and the norm is under way when it waits for both.
        flags = flags.pin_memory().to("cuda", non_blocking=True)
    if flag is not None:
        flags = torch.cat([flags, flag.to(flags)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def drop_unused_gradients(parameters: Sequence[Tensor], used: Sequence[float]) -> None:
    """Take away the gradients of parameters that no rank used, given what `used_somewhere` says."""
    for parameter, some in zip(parameters, used, strict=True):
        if not some:
            parameter.grad = None
