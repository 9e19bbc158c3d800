"""Meshes: one world of ranks, seen as a dense and as a sparse grid.

The same ranks are read in two ways, tensor-parallel partners always next to each other:

- dense  ``(replicate, shard, tensor)``: ranks of one `shard` group read different data and divide the dense weights;
- sparse ``(replicate, expert_shard, expert, tensor)``: ranks of one `expert` group divide the experts of a layer, and
  those of one `expert_shard` group hold the same experts and divide their weights; ``shard = expert_shard * expert``.

An expert's hidden channels are divided among tensor-parallel partners as a dense feed-forward's are. For ZeRO stages 0
and 1, which repeat the weights on all data ranks, `replicate` holds all ranks that would share, and `shard` is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moekit.errors import UserError
from moekit.parallel.layout import Layout

_T = TypeVar("_T")
REPLICATE, SHARD, EXPERT_SHARD, EXPERT, TENSOR = "replicate", "shard", "expert_shard", "expert", "tensor"


@dataclass(frozen=True)
class Meshes:
    """The grids of a layout.

    Attributes:
        layout: The layout that they were built for.
        dense: ``(replicate, shard, tensor)``.
        sparse: ``(replicate, expert_shard, expert, tensor)``.
        data: ``(data_parallel, tensor_parallel)``, the names that Lightning gives to these two.
        timeout: The time after which a rank that waits for others in any of their groups gives up; None = torch's
            default.
    """

    layout: Layout
    dense: DeviceMesh
    sparse: DeviceMesh
    data: DeviceMesh
    timeout: timedelta | None = None

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        return self.layout.data_parallel_size

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank reads; tensor-parallel partners read the same."""
        return int(self.data.get_local_rank("data_parallel"))

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that divide the experts with this one."""
        return self.sparse.get_group(EXPERT)

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """This rank and its tensor-parallel partners."""
        return self.dense.get_group(TENSOR)


_made: dict[Hashable, Any] = {}  # also the default process group, of whose ranks the rest was made


def _kept(key: Hashable, make: Callable[[], _T]) -> _T:
    """What was made of the ranks of the default process group, for whoever asks for the same again.

    A group costs threads and connections that torch frees with the process only, and every fit of a sweep, a notebook
    or a test would make its own. All ranks ask in the same order, so all make or all find.
    """
    if _made.get("world") is not dist.group.WORLD:
        _made.clear()
        _made["world"] = dist.group.WORLD
    if key not in _made:
        _made[key] = make()
    found: _T = _made[key]
    return found


def host_group(purpose: str, timeout: timedelta) -> dist.ProcessGroup:
    """All ranks in a gloo group for values in host memory, one for each purpose, so that none waits in another's turn.

    A rank that waits for others in it gives up after `timeout`.
    """
    return _kept(("host", purpose, timeout), lambda: dist.new_group(backend="gloo", timeout=timeout))


def forget_groups() -> None:
    """Make groups anew from here on: after an error a message may be left in one of the old."""
    _made.clear()


class World:
    """All ranks in a row, and the grid of data ranks and tensor-parallel partners, known before there is a model.

    Args:
        device_type: "cpu" or "cuda".
        tensor_parallel_size: The number of ranks, next to each other, that read the same data.
        timeout: The timeout of every group that is made of these ranks; None = torch's default.

    Attributes:
        all: ``(world,)``.
        data: ``(data_parallel, tensor_parallel)``, the names that Lightning gives to these two.
        timeout: As given.
    """

    def __init__(self, device_type: str, tensor_parallel_size: int, timeout: timedelta | None = None) -> None:
        size = dist.get_world_size()
        self.timeout = timeout

        def row() -> DeviceMesh:
            override = _with_timeout(device_type, (size,), ("world",), timeout)
            return init_device_mesh(device_type, (size,), mesh_dim_names=("world",), backend_override=override)

        self.all = _kept((device_type, timeout), row)
        shape = (size // tensor_parallel_size, tensor_parallel_size)
        self.data = unflatten(self.all, shape, ("data_parallel", "tensor_parallel"), timeout)


def unflatten(
    mesh: DeviceMesh, shape: tuple[int, ...], names: tuple[str, ...], timeout: timedelta | None = None
) -> DeviceMesh:
    """The ranks of a mesh of one dimension as a grid of `shape`, whose groups wait for `timeout`."""
    kind = mesh.device_type
    return _kept(
        (mesh, shape, names, timeout),
        lambda: mesh._unflatten(0, shape, names, _with_timeout(kind, shape, names, timeout)),
    )


def _with_timeout(
    device_type: str, shape: Sequence[int], names: Sequence[str], timeout: timedelta | None
) -> dict[Any, Any]:
    """What makes the groups of a mesh wait for `timeout`; without it smaller groups wait for torch's default.

    The time is given when a group is made: what is set later (`_set_pg_timeout`) does not reach all-to-all on gloo. A
    group of all ranks is the default group again, unless that one waits differently. Where the default group works on
    both devices ("cpu:gloo,cuda:nccl"), the others do too.
    """
    if timeout is None:
        return {}
    backend = dist.group.WORLD._get_backend(torch.device(device_type))  # type: ignore[union-attr]
    made = {"gloo": "ProcessGroupGloo", "nccl": "ProcessGroupNCCL"}.get(backend.name())
    if made is None:
        return {}
    kind = getattr(dist, made)
    both = named if ":" in (named := str(dist.get_backend())) else None

    def options() -> Any:
        own = (kind._Options if made == "ProcessGroupGloo" else kind.Options)()  # a split changes what it is given
        own._timeout = timeout
        return own

    again, size = backend.options._timeout == timeout, dist.get_world_size()
    return {
        name: (both or backend.name(), options())
        for name, n in zip(names, shape, strict=True)
        if not (again and n == size)
    }


def build_meshes(layout: Layout, device_type: str, world: World | None = None) -> Meshes:
    """The grids of `layout` over all ranks of the default process group.

    Args:
        layout: The number of ranks that share each part of the model.
        device_type: "cpu" or "cuda".
        world: The ranks, where a part of the model was divided over them before; None = made here.

    Raises:
        UserError: If the layout is for another number of processes.
    """
    if dist.get_world_size() != layout.devices:
        raise UserError(
            f"a layout must be for the processes there are: got one for {layout.devices}, there are "
            f"{dist.get_world_size()}. Build it with devices={dist.get_world_size()}."
        )
    tensor, expert = layout.tensor_parallel_size, layout.expert_parallel_size
    dense, sparse = (layout.replicas, layout.shard_size, tensor), (layout.replicas, layout.expert_shard_size)
    if layout.zero_stage < 2:
        dense, sparse = (layout.data_parallel_size, 1, tensor), (layout.data_parallel_size // expert, 1)
    names = (REPLICATE, EXPERT_SHARD, EXPERT, TENSOR)
    world = world or World(device_type, tensor)
    return Meshes(
        layout,
        dense=unflatten(world.all, dense, (REPLICATE, SHARD, TENSOR), world.timeout),
        sparse=unflatten(world.all, (*sparse, expert, tensor), names, world.timeout),
        data=world.data,
        timeout=world.timeout,
    )
