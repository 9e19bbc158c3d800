"""Shadows: what an optimizer works on in its step, in place of the model's own parameters.

- ZeRO stage 1: every data rank holds all weights and gradients, and its optimizer works on one slice of each. The
  optimizer's state is then a slice too. After the step the slices are gathered into the weights.
- Offloaded optimizer: what it works on, and so its state, are copies in host memory. Gradients travel there before the
  step and weights back after it.

The optimizer remains the user's object, of any class that treats each entry alone (SGD, Adam, AdamW, ...). Its
`param_groups` and the keys of its `state` are the model's parameters, for schedules, hooks, clipping and whoever adds
groups; shadows stand there only while it steps.

Source: arXiv:1910.02054 section 5.1 (stage 1); arXiv:2101.06840 section 3 (offload).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim import Optimizer

from moekit.parallel.host_copies import to_host
from moekit.parallel.mesh import REPLICATE
from moekit.parallel.pieces import spread
from moekit.parallel.zero import zero_dimension

_BUCKET = 2**24  # entries gathered at once


def original(parameter: Tensor) -> Tensor:
    """The model's parameter that an optimizer's parameter stands for: itself, unless it is a shadow."""
    found: Tensor = getattr(parameter, "shadow_of", parameter)
    return found


@dataclass
class _Shadow:
    """One parameter and what the optimizer sees of it.

    Attributes:
        parameter: the model's.
        tensor: the optimizer's.
        dimension: along which ranks hold different slices, or None.
        group: those ranks.
        seen: the weights' storage and versions (see `_mark`) when a copy was last equal to them.
    """

    parameter: nn.Parameter
    tensor: nn.Parameter
    dimension: int | None
    group: dist.ProcessGroup | None
    seen: tuple[int, int, int] | None = None

    def slice_of(self, whole: Tensor) -> Tensor:
        """This rank's view of a local tensor of the parameter's shape."""
        if self.dimension is None:
            return whole
        assert self.group is not None
        size, length = self.group.size(), whole.shape[self.dimension]
        step = -(-length // size)
        start = min(self.group.rank() * step, length)
        return whole.narrow(self.dimension, start, min(step, length - start))


class Shadows:
    """Let an optimizer step on slices or host copies of its parameters, and keep both sides equal.

    Parameters that join the optimizer later get shadows in the next step. State that the optimizer has already is
    divided, or moved, with its parameter.

    Args:
        optimizer: made over the parameters of a parallelized model.
        divide: whether each data rank takes one slice of what all repeat (ZeRO stage 1).
        device: where the optimizer works; None = where the weights are.

    Raises:
        ValueError: if the optimizer has shadows of another kind.
    """

    def __init__(self, optimizer: Optimizer, *, divide: bool, device: torch.device | None = None) -> None:
        if _shadows_of(optimizer) is not None:
            raise ValueError(
                f"an optimizer must have one kind of shadows: {type(optimizer).__name__} has some already."
            )
        self.optimizer, self.divide, self.device = optimizer, divide, device
        self._of: dict[int, _Shadow] = {}
        self._shown = False
        self._adopt()
        optimizer.register_step_pre_hook(self._before_step)
        handle: Any = optimizer.register_step_post_hook(self._after_step)
        # The hooks of others find the model's weights as the step left them.
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        optimizer._moekit_shadows = self  # type: ignore[attr-defined]

    @classmethod
    def give(cls, optimizer: Optimizer, *, divide: bool, device: torch.device | None = None) -> Shadows:
        """The shadows of an optimizer: those it has if they are of this kind (from another fit), else new ones."""
        found = _shadows_of(optimizer)
        if found is not None and (found.divide, found.device) == (divide, device):
            return found
        return cls(optimizer, divide=divide, device=device)

    @property
    def shadows(self) -> list[_Shadow]:
        """One of each parameter, in the order in which they joined."""
        return list(self._of.values())

    # -- around a step ----------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show shadows, where a closure computes the gradients (under a Trainer) after it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._show()
            return None

        def then_show() -> Any:
            result = closure()
            self._show()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_show}
        return (args[0], then_show, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        self.hide()
        self._give_weights()

    def _show(self) -> None:
        self.show()
        self.take()

    @torch.no_grad()
    def show(self) -> None:
        """Put the shadows in the place of the model's parameters."""
        self._adopt()
        for group in self.optimizer.param_groups:
            group["params"] = [self._of[id(p)].tensor if id(p) in self._of else p for p in group["params"]]
        for shadow in self._of.values():
            state = self.optimizer.state.pop(shadow.parameter, None)
            if state is not None:
                laid = {key: self._laid(value, shadow) for key, value in state.items()}
                self.optimizer.state[shadow.tensor] = laid
        self._shown = True

    def hide(self) -> None:
        """Put the model's parameters back."""
        for group in self.optimizer.param_groups:
            group["params"] = [original(p) for p in group["params"]]
        for shadow in self._of.values():
            shadow.tensor.grad = None
            if shadow.tensor in self.optimizer.state:
                self.optimizer.state[shadow.parameter] = self.optimizer.state.pop(shadow.tensor)
        self._shown = False

    # -- what stands in for a parameter -----------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Make shadows of parameters that have none."""
        if self._shown:  # a step was left by an exception
            self.hide()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and id(parameter) not in self._of:
                    self._of[id(parameter)] = self._shadow(parameter)  # type: ignore[arg-type]

    @torch.no_grad()
    def _shadow(self, parameter: nn.Parameter) -> _Shadow:
        assert isinstance(parameter, DTensor)
        names = parameter.device_mesh.mesh_dim_names or ()
        dimension, group, placements = None, None, list(parameter.placements)
        if self.divide and REPLICATE in names and parameter.ndim:
            at = names.index(REPLICATE)
            dimension, placements[at] = _slice(parameter, at)
            group = parameter.device_mesh.get_group(at)
        shadow = _Shadow(parameter, parameter, dimension, group)
        local = shadow.slice_of(parameter.to_local())
        if self.device is not None:
            local = self._away([local], copy=True)[0]
        shadow.tensor = nn.Parameter(_spread(parameter, local, placements), requires_grad=parameter.requires_grad)
        shadow.tensor.shadow_of = parameter  # type: ignore[attr-defined]
        return shadow

    def _laid(self, value: Any, shadow: _Shadow) -> Any:
        """A statistic of an optimizer laid out like the shadow, where it is laid out like the parameter."""
        seen = shadow.tensor
        assert isinstance(seen, DTensor)
        assert isinstance(shadow.parameter, DTensor)
        if not isinstance(value, DTensor) or value.shape != seen.shape:
            return value
        local = value.to_local()
        if value.placements == shadow.parameter.placements != seen.placements:
            local = shadow.slice_of(local).clone()
        elif value.placements != seen.placements:
            return value
        if self.device is not None:
            local = local.to(self.device)
        return value if local is value.to_local() else _spread(shadow.parameter, local, list(seen.placements))

    @torch.no_grad()
    def take(self) -> None:
        """Show the optimizer the gradients and weights of the model.

        Where the weights have changed by other hands (a checkpoint was loaded), they are taken anew.
        """
        stepped: list[_Shadow] = []
        gradients: list[Tensor] = []
        for shadow in self._of.values():
            self._refresh(shadow)
            shadow.tensor.grad = None
            whole = shadow.parameter.grad
            if whole is not None:
                assert isinstance(whole, DTensor)
                stepped.append(shadow)
                gradients.append(shadow.slice_of(whole.to_local()))
        if self.device is not None:
            gradients = self._away(gradients)
        for shadow, local in zip(stepped, gradients, strict=True):
            assert isinstance(shadow.tensor, DTensor)
            assert isinstance(shadow.parameter, DTensor)
            shadow.tensor.grad = _spread(shadow.parameter, local, list(shadow.tensor.placements))

    def _away(self, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """Tensors where the optimizer works; `copy` also of those that are there."""
        assert self.device is not None
        found = {n: tensor for n, tensor in enumerate(tensors) if copy or tensor.device != self.device}
        if self.device.type == "cpu":
            found = dict(zip(found, to_host(list(found.values())), strict=True))
        else:
            found = {n: tensor.to(self.device, copy=copy) for n, tensor in found.items()}
        return [found.get(n, tensor) for n, tensor in enumerate(tensors)]

    def _refresh(self, shadow: _Shadow) -> None:
        weights, held = _local(shadow.parameter), _local(shadow.tensor)
        if self.device is not None and shadow.seen != _mark(shadow.parameter):
            held.copy_(shadow.slice_of(weights))
            shadow.seen = _mark(shadow.parameter)
        elif self.device is None and held.data_ptr() != shadow.slice_of(weights).data_ptr():
            shadow.tensor._local_tensor = shadow.slice_of(weights)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _give_weights(self) -> None:
        """Write what the optimizer made into the model's weights, on all ranks."""
        for shadow in self._of.values():
            if self.device is not None:
                # The device takes them while the host goes on; `take` waits before anything is written there again.
                shadow.slice_of(_local(shadow.parameter)).copy_(_local(shadow.tensor), non_blocking=True)
        for bucket in self._buckets():
            _gather(bucket)
        for shadow in self._of.values():
            shadow.seen = _mark(shadow.parameter)

    def _buckets(self) -> Iterator[list[_Shadow]]:
        """Divided shadows of one group and type, not too many at once, in an order that all ranks share."""
        kinds: dict[tuple[int, torch.dtype], list[_Shadow]] = {}
        for shadow in self._of.values():
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


def _shadows_of(optimizer: Optimizer) -> Shadows | None:
    return getattr(optimizer, "_moekit_shadows", None)


@contextmanager
def shown(*optimizers: Optimizer) -> Iterator[None]:
    """Optimizers as they are while they step: to load state that is laid out as they keep it."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            shadows = _shadows_of(optimizer)
            if shadows is not None:
                shadows.show()
                stack.callback(shadows.hide)
        yield


def _spread(parameter: DTensor, local: Tensor, placements: list[Placement]) -> DTensor:
    return spread(local, parameter.device_mesh, placements, parameter.shape, parameter.stride())


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter._local_tensor


def _mark(parameter: Tensor) -> tuple[int, int, int]:
    """What changes when weights are written to: what is written through the parameter counts there, else here."""
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
