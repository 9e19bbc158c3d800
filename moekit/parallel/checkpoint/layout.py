"""From a whole tensor to the part that a rank holds of it, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from moekit.parallel.pieces import spread


def empty_like(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor without values: of the same shape, and divided in the same way."""
    return torch.empty_like(like, dtype=dtype, requires_grad=False)


@torch.no_grad()
def laid_out(value: Any, like: Any) -> Any:
    """`value` as `like` is divided; nothing is sent where it is whole, as in a file that every rank reads.

    What is no tensor, or has another shape than `like`, is given back as it is.
    """
    if not isinstance(value, Tensor) or not isinstance(like, Tensor) or value.shape != like.shape:
        return value
    if isinstance(value, DTensor):
        if isinstance(like, DTensor) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements):
            return value
        value = gathered(value)
    if not isinstance(like, DTensor):
        return value
    found: Any = empty_like(like, value.dtype)
    (chunk,) = found.__create_chunk_list__()
    for dimension, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        value = value.narrow(dimension, start, size)
    found.to_local().copy_(value)
    return found


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor, on every rank; all of them call it together."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    # Offloaded weights are gathered where the ranks can talk.
    local = tensor.to_local().to(mesh.device_type)
    there = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return there.full_tensor()


def statistic_like(parameter: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty statistic of an optimizer: divided like its parameter where it has the same shape, else repeated."""
    if name == "step" or (not shape and parameter.ndim):
        # As torch's optimizers keep it; `load_state_dict` moves it where they want it.
        return torch.empty(shape, dtype=dtype)
    if shape == tuple(parameter.shape):
        return empty_like(parameter, dtype)
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    return _repeated(torch.empty(shape, dtype=dtype, device=device), parameter)


def optimizer_state_laid_out(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with every statistic laid out as the parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))
    found = {
        number: {name: _statistic(name, value, of.get(number)) for name, value in statistics.items()}
        for number, statistics in state["state"].items()
    }
    return {**state, "state": found}


def _statistic(name: str, value: Any, parameter: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or name == "step":
        return value
    if value.shape == parameter.shape:
        return laid_out(value, parameter)
    if isinstance(value, DTensor) or not value.ndim:
        return value
    return _repeated(value.to(parameter.to_local().device), parameter)


def _repeated(whole: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    return spread(whole, mesh, [Replicate()] * mesh.ndim, whole.shape, whole.stride())


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
            name: gathered(value).detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in model.state_dict().items()
        }
