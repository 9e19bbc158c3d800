"""Optimizers that were made before their model was sharded: they get the sharded parameters in place of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moekit.errors import UserError
from moekit.parallel.sharding import ShardedModel
from moekit.parallel.shards import shard_like


def rebind_optimizer(optimizer: Optimizer, model: ShardedModel) -> None:
    """Give an optimizer that was made before `parallelize` the parameters that replaced its own.

    Parameter groups, their settings and schedules are kept. State that has the shape of its parameter is sharded as the
    parameter is; like the weights it is taken from rank 0. All ranks must call it together. Groups that hold sharded
    parameters already stay as they are.

    Args:
        optimizer: An optimizer of any class.
        model: The value that `parallelize` returned.

    Raises:
        UserError: Before anything is sent, if the optimizer has a parameter that the model neither has nor had.
    """
    own = {id(parameter) for parameter in model.module.parameters() if isinstance(parameter, DTensor)}
    found = [
        (parameter, _replacement(parameter, model, number, type(optimizer).__name__))
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) not in own
    ]
    if not found:
        return
    new = {id(before): after for before, after in found}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]
    states = [optimizer.state.pop(before, {}) for before, _ in found]
    for (_, after), state in zip(found, _from_rank_zero(states), strict=True):
        if state:
            optimizer.state[after] = {key: _shard(key, value, after) for key, value in state.items()}


def _replacement(parameter: Tensor, model: ShardedModel, group: int, name: str) -> DTensor:
    found = model.replaced.get(parameter)
    if found is None:
        raise UserError(
            f"an optimizer must work on parameters of the model that was divided: group {group} of {name} has one of "
            f"shape {tuple(parameter.shape)} that is none of the model's, and would train nothing. "
            "Register it in a module before the model is divided (in __init__ or configure_model)."
        )
    return found


def _from_rank_zero(states: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The states as rank 0 has them, one after the other: each travels when it is asked for."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield from states
        return
    outlines = [
        [{k: v.to("meta") if isinstance(v, Tensor) and v.ndim else v for k, v in state.items()} for state in states]
    ]
    dist.broadcast_object_list(outlines, src=0)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for mine, theirs in zip(states, outlines[0], strict=True):
        for key, value in theirs.items():
            if isinstance(value, Tensor) and value.is_meta:
                theirs[key] = mine[key].to(device) if dist.get_rank() == 0 else torch.empty_like(value, device=device)
                dist.broadcast(theirs[key], src=0)
        yield theirs


def _shard(key: str, value: Any, parameter: DTensor) -> Any:
    # The step count of a scalar parameter has the parameter's shape, and is no statistic of it.
    if not isinstance(value, Tensor) or value.shape != parameter.shape or key == "step":
        return value
    return shard_like(value.to(parameter.dtype), parameter)
