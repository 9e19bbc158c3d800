"""Master weights: the tensors that an optimizer updates in place of the model's own parameters.

- ZeRO stage 1: every data rank holds all weights and gradients, and its optimizer updates one slice of each. The
  optimizer's state is sharded in the same way. After the step the slices are gathered into the weights.
- Optimizer offload: the optimizer updates copies in host memory, and its state lies there too. Gradients are copied to
  the host before the step, and weights back after it.

The optimizer remains the user's object, of any class that treats each entry alone (SGD, Adam, AdamW, ...). Its
`param_groups` and the keys of its `state` are the model's parameters, for schedules, hooks, clipping and code that adds
groups. Master weights are swapped in only while it steps.

Source: arXiv:1910.02054 section 5.1 (stage 1); arXiv:2101.06840 section 3 (offload).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.optim import Optimizer

from moekit.parallel.host_memory import to_host
from moekit.parallel.layout import zero_dimension
from moekit.parallel.mesh import REPLICATE
from moekit.parallel.shards import dtensor_from_shard

_BUCKET = 2**24  # entries gathered at once


def model_parameter(parameter: Tensor) -> Tensor:
    """The model's parameter behind a parameter of an optimizer: itself, unless it is a master weight."""
    found: Tensor = getattr(parameter, "model_parameter", parameter)
    return found


@dataclass
class MasterWeight:
    """One parameter of the model and the tensor that the optimizer updates for it.

    Attributes:
        parameter: The model's parameter.
        tensor: The parameter that the optimizer updates.
        dimension: The dimension along which the ranks of `group` hold different slices.
        group: The ranks that hold the slices; None = each has the whole.
        synced: Storage and versions of the weights (see `_version`) when a copy was last equal to them.
    """

    parameter: DTensor
    tensor: DTensor
    dimension: int
    group: dist.ProcessGroup | None
    synced: tuple[int, int, int] | None = None

    def slice_of(self, whole: Tensor) -> Tensor:
        """This rank's view of a local tensor of the parameter's shape."""
        if self.group is None:
            return whole
        size, length = self.group.size(), whole.shape[self.dimension]
        step = -(-length // size)
        start = min(self.group.rank() * step, length)
        return whole.narrow(self.dimension, start, min(step, length - start))


class MasterWeights:
    """Let an optimizer update slices or host copies of its parameters, and keep both sides equal.

    Parameters that join the optimizer later get master weights in the next step. State that the optimizer has already
    is sharded, or moved, with its parameter.

    Args:
        optimizer: An optimizer over the parameters of a parallelized model.
        divide: Whether each data rank updates one slice of the parameters that all of them repeat (ZeRO stage 1).
        device: The device on which the optimizer works; None = the device of the weights.

    Attributes:
        entries: The master weights, by id of the model's parameter.

    Raises:
        ValueError: If the optimizer has master weights already.
    """

    def __init__(self, optimizer: Optimizer, *, divide: bool, device: torch.device | None = None) -> None:
        if _of_optimizer(optimizer) is not None:
            raise ValueError(
                f"an optimizer must have one kind of master weights: {type(optimizer).__name__} has some already."
            )
        self.optimizer, self.divide, self.device = optimizer, divide, device
        self.entries: dict[int, MasterWeight] = {}
        self._swapped_in = False
        self._adopt()
        optimizer.register_step_pre_hook(self._before_step)
        handle: Any = optimizer.register_step_post_hook(self._after_step)
        # The hooks of others find the model's weights as the step left them.
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        optimizer._moekit_master_weights = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, optimizer: Optimizer, *, divide: bool, device: torch.device | None = None) -> MasterWeights:
        """The master weights of an optimizer: those of an earlier fit if they are of this kind, else new ones.

        Raises:
            ValueError: If the optimizer has master weights of another kind.
        """
        found = _of_optimizer(optimizer)
        if found is not None and (found.divide, found.device) == (divide, device):
            return found
        return cls(optimizer, divide=divide, device=device)

    # -- around a step ----------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Swap master weights in; where a closure computes the gradients (under a Trainer), after it."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._swap_in_and_load()
            return None

        def then_swap_in() -> Any:
            result = closure()
            self._swap_in_and_load()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_swap_in}
        return (args[0], then_swap_in, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        self.swap_out()
        self._update_model()

    def _swap_in_and_load(self) -> None:
        self.swap_in()
        self.load_from_model()

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the master weights in the place of the model's parameters."""
        self._adopt()
        for group in self.optimizer.param_groups:
            group["params"] = [self.entries[id(p)].tensor if id(p) in self.entries else p for p in group["params"]]
        for entry in self.entries.values():
            state = self.optimizer.state.pop(entry.parameter, None)
            if state is not None:
                sharded = {key: self._shard_statistic(value, entry) for key, value in state.items()}
                self.optimizer.state[entry.tensor] = sharded
        self._swapped_in = True

    def swap_out(self) -> None:
        """Put the model's parameters back."""
        for group in self.optimizer.param_groups:
            group["params"] = [model_parameter(p) for p in group["params"]]
        for entry in self.entries.values():
            entry.tensor.grad = None
            if entry.tensor in self.optimizer.state:
                self.optimizer.state[entry.parameter] = self.optimizer.state.pop(entry.tensor)
        self._swapped_in = False

    # -- making and updating master weights -------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Make master weights of parameters that have none."""
        if self._swapped_in:  # a step was left by an exception
            self.swap_out()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and id(parameter) not in self.entries:
                    self.entries[id(parameter)] = self._make(parameter)

    @torch.no_grad()
    def _make(self, parameter: DTensor) -> MasterWeight:
        names = parameter.device_mesh.mesh_dim_names or ()
        entry, placements = MasterWeight(parameter, parameter, 0, None), list(parameter.placements)
        if self.divide and REPLICATE in names and parameter.ndim:
            at = names.index(REPLICATE)
            cut = _slice(parameter, at)
            if cut is not None:
                entry.dimension, placements[at] = cut
                entry.group = parameter.device_mesh.get_group(at)
        local = entry.slice_of(parameter.to_local())
        if self.device is not None:
            local = self._to_device([local], copy=True)[0]
        made: Any = nn.Parameter(_sharded_as(parameter, local, placements), requires_grad=parameter.requires_grad)
        made.model_parameter = parameter
        entry.tensor = made
        return entry

    def _shard_statistic(self, value: Any, entry: MasterWeight) -> Any:
        """A statistic of the optimizer sharded like the master weight, where it is sharded like the parameter."""
        master = entry.tensor
        if not isinstance(value, DTensor) or value.shape != master.shape:
            return value
        local = value.to_local()
        if value.placements == entry.parameter.placements != master.placements:
            local = entry.slice_of(local).clone()
        elif value.placements != master.placements:
            return value
        if self.device is not None:
            local = local.to(self.device)
        return value if local is value.to_local() else _sharded_as(entry.parameter, local, master.placements)

    @torch.no_grad()
    def load_from_model(self) -> None:
        """Give the optimizer the gradients of the model, and its weights where others have written to them.

        Others write to them when a checkpoint is loaded.
        """
        with_gradient: list[MasterWeight] = []
        gradients: list[Tensor] = []
        for entry in self.entries.values():
            self._refresh(entry)
            entry.tensor.grad = None
            whole = entry.parameter.grad
            if isinstance(whole, DTensor):
                with_gradient.append(entry)
                gradients.append(entry.slice_of(whole.to_local()))
        if self.device is not None:
            gradients = self._to_device(gradients)
        for entry, local in zip(with_gradient, gradients, strict=True):
            entry.tensor.grad = _sharded_as(entry.parameter, local, entry.tensor.placements)

    def _to_device(self, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """Tensors where the optimizer works; `copy` also if all are there."""
        assert self.device is not None
        if not copy and all(tensor.device == self.device for tensor in tensors):
            return tensors
        if self.device.type == "cpu":
            return to_host(tensors)
        return [tensor.to(self.device, copy=copy) for tensor in tensors]

    def _refresh(self, entry: MasterWeight) -> None:
        weights, held = entry.slice_of(entry.parameter._local_tensor), entry.tensor._local_tensor
        if self.device is not None and entry.synced != _version(entry.parameter):
            held.copy_(weights)
            entry.synced = _version(entry.parameter)
        elif self.device is None and held.data_ptr() != weights.data_ptr():
            entry.tensor._local_tensor = weights

    @torch.no_grad()
    def _update_model(self) -> None:
        """Write the updated master weights into the model's weights, on all ranks."""
        for entry in self.entries.values():
            if self.device is not None:
                # The device reads them while the host goes on; `load_from_model` waits before it writes there again.
                entry.slice_of(entry.parameter._local_tensor).copy_(entry.tensor._local_tensor, non_blocking=True)
        for bucket in self._buckets():
            _gather(bucket)
        for entry in self.entries.values():
            entry.synced = _version(entry.parameter)

    def _buckets(self) -> Iterator[list[MasterWeight]]:
        """Divided master weights of one group and type, not too many at once, in an order that all ranks share."""
        kinds: dict[tuple[int, torch.dtype], list[MasterWeight]] = {}
        for entry in self.entries.values():
            if entry.group is not None and entry.group.size() > 1:
                kinds.setdefault((id(entry.group), entry.parameter.dtype), []).append(entry)
        for kind in kinds.values():
            bucket: list[MasterWeight] = []
            entries = 0
            for entry in kind:
                if bucket and entries + entry.parameter.numel() > _BUCKET:
                    yield bucket
                    bucket, entries = [], 0
                bucket.append(entry)
                entries += entry.parameter.numel()
            yield bucket


def _of_optimizer(optimizer: Optimizer) -> MasterWeights | None:
    return getattr(optimizer, "_moekit_master_weights", None)


@contextmanager
def swapped_in(*optimizers: Optimizer) -> Iterator[None]:
    """Optimizers with master weights swapped in, as in a step: to load state that is sharded as they keep it."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            master = _of_optimizer(optimizer)
            if master is not None:
                master.swap_in()
                stack.callback(master.swap_out)
        yield


def _sharded_as(parameter: DTensor, local: Tensor, placements: Sequence[Placement]) -> DTensor:
    return dtensor_from_shard(local, parameter.device_mesh, placements, parameter.shape, parameter.stride())


def _version(parameter: DTensor) -> tuple[int, int, int]:
    """What changes when weights are written to: what is written through the parameter counts there, else here."""
    local = parameter._local_tensor
    return local.data_ptr(), local._version, parameter._version


def _slice(parameter: DTensor, at: int) -> tuple[int, Placement] | None:
    """Along which dimension the ranks of mesh dimension `at` take slices, and how a DTensor says so; None = none."""
    mesh, places = parameter.device_mesh, parameter.placements
    others = [(n, place) for n, place in enumerate(places) if isinstance(place, Shard) and mesh.size(n) > 1]
    taken = {place.dim for _, place in others}
    dimension = zero_dimension(parameter.to_local().shape, taken, mesh.size(at))
    if dimension is None:
        return None
    parts = math.prod(mesh.size(n) for n, place in others if n > at and place.dim == dimension)
    return dimension, _StridedShard(dimension, split_factor=parts) if parts > 1 else Shard(dimension)


def _gather(bucket: list[MasterWeight]) -> None:
    """Every rank's slices into everybody's weights."""
    group = bucket[0].group
    assert group is not None
    size = group.size()
    slices = []
    for entry in bucket:
        weights = entry.parameter._local_tensor
        mine = entry.slice_of(weights).movedim(entry.dimension, 0)
        step = -(-weights.shape[entry.dimension] // size)
        padded = mine.new_zeros(step, *mine.shape[1:])
        padded[: mine.shape[0]] = mine
        slices.append(padded)
    # Offloaded weights are in host memory, where a GPU's process group cannot reach them.
    sent = torch.cat([part.reshape(-1) for part in slices]).to(bucket[0].parameter.device_mesh.device_type)
    received = sent.new_empty(size * sent.numel())
    dist.all_gather(list(received.view(size, -1)), sent, group=group)
    for rank, flat in enumerate(received.view(size, -1)):
        start = 0
        for entry, part in zip(bucket, slices, strict=True):
            whole = entry.parameter._local_tensor.movedim(entry.dimension, 0)
            into = whole[rank * part.shape[0] :][: part.shape[0]]
            found = flat[start : start + part.numel()].view_as(part)
            into.copy_(found[: into.shape[0]])
            start += part.numel()
