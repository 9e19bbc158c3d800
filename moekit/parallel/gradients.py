"""Gradients of parameters that lie on several meshes: norm and clipping, and a mean over all ranks' tokens.

`torch.nn.utils.clip_grad_norm_` refuses parameters of two meshes. Here every rank adds up what it holds, each sum
travels over the dimensions along which its parameters are divided, and no others: what ranks repeat counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient; writing to it changes the gradient."""
    grad = parameter.grad
    return grad.to_local() if isinstance(grad, DTensor) else grad


def gradient_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients together, as one process would compute it; a scalar, equal on all ranks.

    All ranks must call it with their parts of the same parameters. A parameter without a gradient counts as zero.

    Args:
        parameters: DTensors on any meshes, and plain tensors, which all ranks repeat.
        norm_type: The p of the norm, or infinity.

    Returns:
        Float32; Float64 if gradients are.

    Raises:
        ValueError: If `norm_type` is not positive.
    """
    return _norm(((parameter, local_gradient(parameter)) for parameter in parameters), norm_type)


def norm_of(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all `tensors` together, as `gradient_norm` that of gradients."""
    return _norm(((t, t.to_local() if isinstance(t, DTensor) else t) for t in tensors), norm_type)


@torch.no_grad()
def _norm(parts: Iterable[tuple[Tensor, Tensor | None]], norm_type: float) -> Tensor:
    """That of the second tensors, which are this rank's parts of what is divided like the first."""
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive or infinity: got {norm_type}.")
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    device, dtype = torch.device("cpu"), torch.float32
    for whole, part in parts:
        dtype, device = torch.promote_types(dtype, whole.dtype), whole.device
        divided: tuple[int, ...] = ()
        if isinstance(whole, DTensor):
            mesh, places = whole.device_mesh, enumerate(whole.placements)
            device = torch.device(mesh.device_type)
            divided = tuple(n for n, place in places if not place.is_replicate() and mesh.size(n) > 1)
        found = groups.setdefault((mesh, divided) if divided else (None, ()), [])
        if part is not None and part.numel():
            found.append(part)
    infinite = norm_type == float("inf")
    total = torch.zeros((), dtype=dtype, device=device)
    for (grid, divided), grads in groups.items():
        value = torch.zeros((), dtype=dtype, device=device)
        if grads:
            norms = _norms(grads, norm_type, dtype, device)
            value = norms.max() if infinite else norms.pow(norm_type).sum()
        for dimension in divided:
            assert grid is not None
            operation = dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM
            dist.all_reduce(value, operation, group=grid.get_group(dimension))
        total = torch.maximum(total, value) if infinite else total + value
    return total if infinite else total.pow(1.0 / norm_type)


def _norms(grads: list[Tensor], norm_type: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The norm of each, on `device`: gradients in host memory send theirs together."""
    places: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        places.setdefault(grad.device, []).append(grad)
    found = [torch.stack(torch._foreach_norm(part, norm_type, dtype=dtype)) for part in places.values()]
    return torch.cat([norms.to(device) for norms in found])  # host read: of gradients in host memory alone


@torch.no_grad()
def clip_by_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, *, norm: Tensor | None = None
) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before.

    Args:
        parameters: The parameters, all of those that share a norm.
        max_norm: The largest norm allowed.
        norm_type: The p of the norm, or infinity.
        norm: The value of `gradient_norm` for them, where it is known already.

    Source: arXiv:1211.5063. As in `torch.nn.utils.clip_grad_norm_`, 1e-6 is added to the norm that divides.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters, norm_type) if norm is None else norm
    scale_to_norm(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def scale_to_norm(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, so that it is at most `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    found = [grad for grad in map(local_gradient, parameters) if grad is not None]
    devices = {grad.device for grad in found}
    factors = {device: factor.to(device) for device in devices}  # host read: for gradients in host memory, once
    for grad in found:
        grad.mul_(factors[grad.device])


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """Clip every entry of every gradient to -max_value..max_value."""
    for grad in map(local_gradient, parameters):
        if grad is not None:
            grad.clamp_(-max_value, max_value)


def global_mean(total: Tensor, count: Tensor | int, group: dist.ProcessGroup | None = None) -> Tensor:
    """A rank's share of a mean over the tokens of all ranks: their average over ranks is that mean, gradients included.

    For losses of batches of unequal sizes, or with padding: a mean over each rank's own tokens would weigh the tokens
    of a small batch more.

    Args:
        total: The loss summed over this rank's tokens, with gradient.
        count: The number of these tokens; may be 0.
        group: The ranks over which the mean is taken; None = all. Without torch.distributed it is the plain mean.
    """
    counted = torch.as_tensor(count, dtype=torch.float32, device=total.device).detach()
    return total / counted.clamp_min(1.0) * global_weights(counted, group)


@torch.no_grad()
def global_weights(counts: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """What makes means over each rank's own tokens, averaged over ranks, means over the tokens of all ranks.

    Several means at once cost one collective.

    Args:
        counts: The number of this rank's tokens for each mean; may be 0. Any shape, equal on all ranks.
        group: The ranks over which the mean is taken; None = all.

    Returns:
        Float32 of that shape: ranks * own / all; 1 without torch.distributed.
    """
    own = counts.detach().float()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return torch.ones_like(own)
    everyone = own.clone()
    dist.all_reduce(everyone, group=group)
    return own * dist.get_world_size(group) / everyone.clamp_min(1.0)
