"""Shadows: what an optimizer works on in place of the model's own parameters.

- ZeRO stage 1: every data rank holds all weights and gradients, and its optimizer works on one slice of each. The
  optimizer's state is then a slice too. After the step the slices are gathered into the weights.
- Offloaded optimizer: its parameters, and so its state, are copies in host memory. Gradients travel there before the
  step and weights back after it.

The optimizer remains the user's object, of any class that treats each entry alone (SGD, Adam, AdamW, ...); only the
tensors in its `param_groups` are exchanged, so learning-rate schedules and hooks go on working.

Source: arXiv:1910.02054 section 5.1 (stage 1); arXiv:2101.06840 section 3 (offload).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim import Optimizer

from moekit.parallel.mesh import REPLICATE
from moekit.parallel.zero import zero_dimension

_BUCKET = 2**24  # entries gathered at once


def original(parameter: Tensor) -> Tensor:
    """The model's parameter that an optimizer's parameter stands for: itself, unless it is a shadow."""
    found: Tensor = getattr(parameter, "shadow_of", parameter)
    return found


@contextmanager
def shown(*optimizers: Optimizer) -> Iterator[None]:
    """Optimizers as they are while they step: to load state that is laid out as they keep it."""
    yield  # as they always are


@dataclass
class _Shadow:
    """One parameter and what the optimizer sees of it.

    Attributes:
        parameter: the model's.
        tensor: the optimizer's.
        dimension: along which ranks hold different slices, or None.
        group: those ranks.
        seen: the weights' storage and versions (see `_mark`) when a copy was last equal to them.
        taken: the gradient that was copied last, and its version then.
    """

    parameter: nn.Parameter
    tensor: nn.Parameter
    dimension: int | None
    group: dist.ProcessGroup | None
    seen: tuple[int, int, int] | None = None
    taken: tuple[Tensor, int] | None = None

    def slice_of(self, whole: Tensor) -> Tensor:
        """This rank's view of a local tensor of the parameter's shape."""
        if self.dimension is None:
            return whole
        assert self.group is not None
        size, length = self.group.size(), whole.shape[self.dimension]
        step = -(-length // size)
        start = min(self.group.rank() * step, length)
        return whole.narrow(self.dimension, start, min(step, length - start))


class _ClearsBoth(Optimizer):
    """An optimizer whose `zero_grad` clears its own tensors and the model's."""

    _shadows: Shadows

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._shadows.clear_gradients()


class Shadows:
    """Exchange an optimizer's parameters for slices or host copies, and keep both sides equal.

    Args:
        optimizer: made over the parameters of a parallelized model; has not stepped yet.
        divide: whether each data rank takes one slice of what all repeat (ZeRO stage 1).
        device: where the optimizer works; None = where the weights are.

    Raises:
        ValueError: if the optimizer has state already.
    """

    def __init__(self, optimizer: Optimizer, *, divide: bool, device: torch.device | None = None) -> None:
        if optimizer.state:
            raise ValueError("an optimizer must be given before its first step: got one that has state. Make it anew.")
        self.optimizer, self.divide, self.device = optimizer, divide, device
        self.shadows: list[_Shadow] = []
        for group in optimizer.param_groups:
            group["params"] = [self._shadow(parameter) for parameter in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: self.take_gradients())
        optimizer.register_step_post_hook(lambda *_: self.give_weights())
        # A subclass, not an attribute: Lightning wraps optimizers in a class that it derives from theirs.
        optimizer._shadows = self  # type: ignore[attr-defined]
        optimizer.__class__ = type(type(optimizer).__name__, (_ClearsBoth, type(optimizer)), {})

    def clear_gradients(self) -> None:
        """Drop the model's gradients."""
        for shadow in self.shadows:
            shadow.parameter.grad = shadow.taken = None

    @torch.no_grad()
    def _shadow(self, parameter: nn.Parameter) -> nn.Parameter:
        if not isinstance(parameter, DTensor):
            return parameter
        names = parameter.device_mesh.mesh_dim_names or ()
        dimension, group, placements = None, None, list(parameter.placements)
        if self.divide and REPLICATE in names and parameter.ndim:
            at = names.index(REPLICATE)
            dimension, placements[at] = _slice(parameter, at)
            group = parameter.device_mesh.get_group(at)
        shadow = _Shadow(parameter, parameter, dimension, group)
        local = shadow.slice_of(parameter.to_local())
        if self.device is not None:
            local = local.to(self.device, copy=True)
        tensor = nn.Parameter(self._spread(parameter, local, placements), requires_grad=parameter.requires_grad)
        tensor.shadow_of = parameter  # type: ignore[attr-defined]
        shadow.tensor = tensor
        self.shadows.append(shadow)
        return tensor

    @staticmethod
    def _spread(parameter: DTensor, local: Tensor, placements: list[Placement]) -> DTensor:
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Show the optimizer the gradients and weights of the model. Called before a step; again is harmless.

        Where the weights have changed by other hands (a checkpoint was loaded), they are taken anew.
        """
        for shadow in self.shadows:
            self._refresh(shadow)
            whole = shadow.parameter.grad
            if whole is None:
                shadow.tensor.grad = shadow.taken = None
                continue
            assert isinstance(whole, DTensor)
            version = whole.to_local()._version
            same = shadow.taken is not None and shadow.taken[0] is whole and shadow.taken[1] == version
            if self.device is not None and same and shadow.tensor.grad is not None:
                continue  # a copy that may have been clipped since
            shadow.taken = (whole, version)
            local = shadow.slice_of(whole.to_local())
            if self.device is not None:
                local = local.to(self.device)
            assert isinstance(shadow.tensor, DTensor)
            assert isinstance(shadow.parameter, DTensor)
            shadow.tensor.grad = self._spread(shadow.parameter, local, list(shadow.tensor.placements))

    def _refresh(self, shadow: _Shadow) -> None:
        weights, held = _local(shadow.parameter), _local(shadow.tensor)
        if self.device is not None and shadow.seen != _mark(shadow.parameter):
            held.copy_(shadow.slice_of(weights))
            shadow.seen = _mark(shadow.parameter)
        elif self.device is None and held.data_ptr() != shadow.slice_of(weights).data_ptr():
            shadow.tensor._local_tensor = shadow.slice_of(weights)  # type: ignore[attr-defined]

    @torch.no_grad()
    def give_weights(self) -> None:
        """Write what the optimizer made into the model's weights, on all ranks. Called after a step."""
        for shadow in self.shadows:
            if self.device is not None:
                shadow.slice_of(_local(shadow.parameter)).copy_(_local(shadow.tensor))
        for bucket in self._buckets():
            _gather(bucket)
        for shadow in self.shadows:
            shadow.seen = _mark(shadow.parameter)

    def _buckets(self) -> Iterator[list[_Shadow]]:
        """Divided shadows of one group and type, not too many at once, in an order that all ranks share."""
        kinds: dict[tuple[int, torch.dtype], list[_Shadow]] = {}
        for shadow in self.shadows:
            if shadow.dimension is not None and shadow.group is not None and shadow.group.size() > 1:
                kinds.setdefault((id(shadow.group), shadow.parameter.dtype), []).append(shadow)
        for shadows in kinds.values():
            bucket: list[_Shadow] = []
            entries = 0
            for shadow in shadows:
                if bucket and entries + shadow.parameter.numel() > _BUCKET:
                    yield bucket
                    bucket, entries = [], 0
                bucket.append(shadow)
                entries += shadow.parameter.numel()
            yield bucket


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter._local_tensor


def _mark(parameter: Tensor) -> tuple[int, int, int]:
    """What changes when weights are written to: writing through the parameter does not count at its local tensor."""
    local = _local(parameter)
    return local.data_ptr(), local._version, parameter._version


def _slice(parameter: DTensor, at: int) -> tuple[int | None, Placement]:
    """Along which dimension the ranks of mesh dimension `at` take slices, and how a DTensor says so."""
    mesh, places = parameter.device_mesh, parameter.placements
    others = [(n, place) for n, place in enumerate(places) if isinstance(place, Shard) and mesh.size(n) > 1]
    taken = {place.dim for _, place in others}
    dimension = zero_dimension(parameter.to_local().shape, taken, mesh.size(at))
    if dimension is None:
        return None, places[at]
    parts = 1
    for n, place in others:
        parts *= mesh.size(n) if n > at and place.dim == dimension else 1
    return dimension, _StridedShard(dimension, split_factor=parts) if parts > 1 else Shard(dimension)


def _gather(bucket: list[_Shadow]) -> None:
    """Every rank's slices into everybody's weights."""
    group = bucket[0].group
    assert group is not None
    size = group.size()
    pieces = []
    for shadow in bucket:
        assert shadow.dimension is not None
        weights = _local(shadow.parameter)
        mine = shadow.slice_of(weights).movedim(shadow.dimension, 0)
        step = -(-weights.shape[shadow.dimension] // size)
        padded = mine.new_zeros(step, *mine.shape[1:])
        padded[: mine.shape[0]] = mine
        pieces.append(padded)
    assert isinstance(bucket[0].parameter, DTensor)
    # Offloaded weights are in host memory, where a GPU's process group cannot reach them.
    sent = torch.cat([piece.reshape(-1) for piece in pieces]).to(bucket[0].parameter.device_mesh.device_type)
    received = sent.new_empty(size * sent.numel())
    dist.all_gather(list(received.view(size, -1)), sent, group=group)
    for rank, flat in enumerate(received.view(size, -1)):
        start = 0
        for shadow, piece in zip(bucket, pieces, strict=True):
            assert shadow.dimension is not None
            into = _local(shadow.parameter).movedim(shadow.dimension, 0)[rank * piece.shape[0] :][: piece.shape[0]]
            found = flat[start : start + piece.numel()].view_as(piece)
            into.copy_(found[: into.shape[0]])
            start += piece.numel()
