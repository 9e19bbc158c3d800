"""Adafactor as T5 and its sparse successors use it, also for parameters that are divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

from moekit.parallel.shards import dtensor_from_shard, local_shard

_BUCKET = 2**24  # entries updated at once


class Adafactor(Optimizer):
    """Adam without momentum, whose second moment of a matrix is kept as one number for each row and each column.

    With g the gradient, and a mean over a row or a column written as r or c, step t does::

        beta = 1 - t ** -decay_rate
        r = beta * r + (1 - beta) * mean(g ** 2 + eps_moment, over the row);  c likewise
        u = g / sqrt(r c / mean(r))
        u = u / max(1, RMS(u) / clip_update)
        weight = weight - lr * max(eps_scale, RMS(weight)) * u

    What has less than two dimensions, or a small one, keeps a number for each entry. Of a parameter with more
    dimensions than two the last two are rows and columns. All arithmetic and all state is float32.

    Parameters may be divided (DTensors, on any mesh): means over rows, columns and whole tensors are then summed over
    the ranks that divide them, in three collectives for each group of ranks and 2^24 entries, so that the result is
    that of one process up to rounding. All ranks must have gradients of the same parameters.

    Args:
        params: parameters or groups. A group may set ``batch_dims``: so many leading dimensions count separate
            tensors, each with rows, columns and RMS of its own. Banks of experts have 1.
        lr: relative to the size of the weights where `scale_by_parameter`.
        decay_rate: how fast the second moment forgets: 0.8 in the paper.
        clip_update: largest RMS of an update before the learning rate; None = no clipping. 1 in the paper.
        scale_by_parameter: whether steps are relative to the RMS of the weights.
        eps_moment: added to squared gradients.
        eps_scale: least RMS of weights.
        weight_decay: decoupled: ``lr * weight_decay * weight`` is subtracted.
        min_factored_size: both last dimensions must be at least this to be factored.
        batch_dims: default of the groups.

    Raises:
        ValueError: for values out of range.

    Source: arXiv:1804.04235 algorithm 4, with the decay of section 7.2 and the clipping of section 6; dimensions that
    count separate tensors are t5x's ``FactorDim.BATCH``, which its sparse models use for experts; values of T5.
    Differs: `torch.optim.Adafactor` has no `batch_dims`, scales by ``min(lr, 1 / sqrt(t))`` and divides no parameters
    of several meshes; Mesh TensorFlow factors the two largest dimensions and takes RMS over all experts together.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        decay_rate: float = 0.8,
        clip_update: float | None = 1.0,
        scale_by_parameter: bool = True,
        eps_moment: float = 1e-30,
        eps_scale: float = 1e-3,
        weight_decay: float = 0.0,
        min_factored_size: int = 128,
        batch_dims: int = 0,
    ) -> None:
        if not lr >= 0 or not decay_rate > 0 or not weight_decay >= 0:
            raise ValueError(
                "Adafactor needs lr >= 0, decay_rate > 0 and weight_decay >= 0: got "
                f"{lr}, {decay_rate} and {weight_decay}."
            )
        if clip_update is not None and not clip_update > 0:
            raise ValueError(f"clip_update must be positive, or None for no clipping: got {clip_update}.")
        if not eps_moment > 0 or not eps_scale >= 0:
            raise ValueError(
                "Adafactor needs eps_moment > 0, by which what has no gradient yet is divided, and eps_scale >= 0: got "
                f"{eps_moment} and {eps_scale}."
            )
        if batch_dims < 0:
            raise ValueError(f"batch_dims must be the number of leading dimensions, 0 or more: got {batch_dims}.")
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "clip_update": clip_update,
            "scale_by_parameter": scale_by_parameter,
            "eps_moment": eps_moment,
            "eps_scale": eps_scale,
            "weight_decay": weight_decay,
            "min_factored_size": min_factored_size,
            "batch_dims": batch_dims,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Raises:
            ValueError: for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bucket: list[Generator[list[_Sum], None, None]] = []
        entries = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError("Adafactor needs dense gradients: got sparse ones. Use Embedding(sparse=False).")
                if bucket and entries + parameter.numel() > _BUCKET:
                    _run_together(bucket)
                    bucket, entries = [], 0
                bucket.append(_update(parameter, group, self.state[parameter]))
                entries += parameter.numel()
        _run_together(bucket)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in any optimizer, except that statistics stay in float32 where weights are in a lower precision."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(_local(parameter).device, torch.float32, copy=True)


_Sum = tuple[Tensor, DeviceMesh | None, tuple[int, ...]]
"""A rank's float32 sum over dimensions of a tensor, to become in place that of all ranks; the mesh that divides the
tensor, or None; and the dimensions of the mesh that divide what was summed.
"""


def _run_together(updates: Iterable[Generator[list[_Sum], None, None]]) -> None:
    """Run updates side by side, so that what they sum at the same point travels together."""
    running = list(updates)
    while running:
        sums: list[_Sum] = []
        going = []
        for update in running:
            found = next(update, None)
            if found is not None:
                sums += found
                going.append(update)
        _add_up(sums)
        running = going


def _add_up(sums: Iterable[_Sum]) -> None:
    together: dict[tuple[DeviceMesh, tuple[int, ...]], list[Tensor]] = {}
    for value, mesh, axes in sums:
        if mesh is not None and axes:
            together.setdefault((mesh, axes), []).append(value)
    for (mesh, axes), values in together.items():
        flat = torch.cat([value.flatten() for value in values]).to(mesh.device_type)
        for axis in axes:
            dist.all_reduce(flat, group=mesh.get_group(axis))
        for value, total in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(total.view_as(value))


@dataclass(frozen=True)
class _Division:
    """How a parameter, or a statistic of one, is divided."""

    mesh: DeviceMesh | None  # None = not at all
    placements: tuple[Placement, ...]
    shape: torch.Size  # the whole's

    @classmethod
    def of(cls, tensor: Tensor) -> _Division:
        if isinstance(tensor, DTensor):
            return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape)
        return cls(None, (), tensor.shape)

    def sum_of(self, value: Tensor, dims: Sequence[int]) -> _Sum:
        """This rank's sum over dimensions of the tensor, with the dimensions of the mesh that divide these."""
        mesh = self.mesh
        if mesh is None:
            return value, None, ()
        return value, mesh, tuple(n for n, p in enumerate(self.placements) if _dim(p) in dims and mesh.size(n) > 1)

    def without(self, dim: int) -> _Division:
        """That of a tensor in which a dimension was summed away."""
        placements = tuple(_shifted(place, dim) for place in self.placements)
        return _Division(self.mesh, placements, torch.Size([n for d, n in enumerate(self.shape) if d != dim]))

    def piece(self, value: Tensor) -> Tensor:
        """This rank's part of a statistic, however it is laid out (after loading it may be whole)."""
        if isinstance(value, DTensor):
            if self.mesh is not None and tuple(value.placements) == self.placements:
                return value.to_local()
            value = value.full_tensor()
        if self.mesh is None:
            return value
        return local_shard(value, self.mesh, self.placements).contiguous()

    def dtensor_from_shard(self, piece: Tensor) -> Tensor:
        """A statistic as checkpoints expect it."""
        if self.mesh is None:
            return piece
        stride = torch.empty(self.shape, device="meta").stride()
        return dtensor_from_shard(piece, self.mesh, self.placements, self.shape, stride)


def _dim(place: Placement) -> int | None:
    found: int | None = getattr(place, "dim", None)
    return found


def _shifted(place: Placement, dim: int) -> Placement:
    at = _dim(place)
    if at is None or at == dim:
        return Replicate()
    at -= at > dim
    return _StridedShard(at, split_factor=place.split_factor) if isinstance(place, _StridedShard) else Shard(at)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _update(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Generator[list[_Sum], None, None]:
    """Change one parameter and its state; yields what must be summed over ranks before it goes on."""
    division = _Division.of(parameter)
    assert parameter.grad is not None
    weight, grad = _local(parameter), _local(parameter.grad).float()
    state["step"] = state.get("step", 0) + 1
    fresh = state["step"] ** -group["decay_rate"]
    squares = grad.square() + group["eps_moment"]
    ndim, batch = parameter.ndim, group["batch_dims"]
    if ndim - batch >= 2 and min(parameter.shape[-2:]) >= group["min_factored_size"]:
        rows, columns = division.without(ndim - 1), division.without(ndim - 2)
        row, column = squares.sum(-1), squares.sum(-2)
        yield [division.sum_of(row, [ndim - 1]), division.sum_of(column, [ndim - 2])]
        row = _moved(state, "row", rows, row / parameter.shape[-1], fresh)
        column = _moved(state, "column", columns, column / parameter.shape[-2], fresh)
        mean = row.sum(-1, keepdim=True)
        yield [rows.sum_of(mean, [ndim - 2])]
        mean /= parameter.shape[-2]
        update = grad * (row / mean).rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
    else:
        update = grad * _moved(state, "square", division, squares, fresh).rsqrt()
    del squares
    dims = list(range(batch, ndim))
    count = parameter.shape[batch:].numel()
    of_update, of_weight = _sum_of_squares(update, dims), _sum_of_squares(weight.float(), dims)
    yield [division.sum_of(of_update, dims), division.sum_of(of_weight, dims)]
    if group["clip_update"] is not None:
        update /= ((of_update / count).sqrt() / group["clip_update"]).clamp_min(1.0)
    if group["scale_by_parameter"]:
        update *= (of_weight / count).sqrt().clamp_min(group["eps_scale"])
    new = weight.float() * (1.0 - group["lr"] * group["weight_decay"]) - group["lr"] * update
    weight.copy_(new)


def _moved(state: dict[str, Any], key: str, division: _Division, value: Tensor, fresh: float) -> Tensor:
    """A statistic after its step towards `value`, a new one at `value`; this rank's part."""
    held = division.piece(state[key]).lerp_(value, fresh) if key in state else value
    state[key] = division.dtensor_from_shard(held)
    return held


def _sum_of_squares(tensor: Tensor, dims: list[int]) -> Tensor:
    squares = tensor.square()
    return squares.sum(dims, keepdim=True) if dims else squares
