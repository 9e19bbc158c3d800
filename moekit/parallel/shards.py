"""From a whole tensor to the shard that a rank holds of it, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_shard(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's shard of `whole`, as a view."""
    lengths, starts = compute_local_shape_and_global_offset(whole.shape, mesh, tuple(placements))
    for dimension, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension] - length), length)
    return whole


def dtensor_from_shard(
    shard: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """A DTensor around a shard, without a copy: `DTensor.from_local` would move it to the mesh's kind of device."""
    meta = TensorMeta(torch.Size(shape), tuple(stride), shard.dtype)
    return DTensor(shard, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def replicated_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` as a DTensor that every rank of the mesh of `like` repeats; as it is where `like` is no DTensor."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return dtensor_from_shard(whole, mesh, [Replicate()] * mesh.ndim, whole.shape, whole.stride())


@torch.no_grad()
def shard_like(value: Any, like: Any) -> Any:
    """`value` sharded as `like`; nothing is sent where it is whole, as in a file that every rank reads.

    What is no tensor, or has another shape than `like`, is returned as it is.
    """
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.shape != like.shape:
        return value
    if isinstance(value, DTensor):
        if isinstance(like, DTensor) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements):
            return value
        value = full_tensor(value)
    if not isinstance(like, DTensor):
        return value
    found: Any = torch.empty_like(like, dtype=value.dtype)
    found.to_local().copy_(local_shard(value, like.device_mesh, like.placements))
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all ranks call it together."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    # Offloaded weights are gathered on the device that the process group communicates from.
    local = tensor.to_local().to(mesh.device_type)
    there = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return there.full_tensor()


def gather_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a parallelized model as one process would have it: whole tensors in host memory.

    All processes call it together; each gets all of it. A model of the same class that is not parallelized loads it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> nn.Linear(2, 2).load_state_dict(gather_state_dict(model))
        <All keys matched successfully>
    """
    with torch.no_grad():
        return {
            name: full_tensor(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in model.state_dict().items()
        }
