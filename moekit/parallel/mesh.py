"""Meshes: one world of ranks, seen as a dense and as a sparse grid.

The same ranks are read in two ways, tensor-parallel partners always next to each other:

- dense  ``(replicate, shard, tensor)``: ranks of one `shard` group read different data and divide the dense weights;
- sparse ``(replicate, expert_shard, expert, tensor)``: ranks of one `expert` group divide the experts of a layer, and
  those of one `expert_shard` group hold the same experts and divide their weights; ``shard = expert_shard * expert``.

An expert's hidden channels are divided among tensor-parallel partners as a dense feed-forward's are. For ZeRO stages 0
and 1, which repeat the weights on all data ranks, `replicate` holds all ranks that would share, and `shard` is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moekit.errors import UserError
from moekit.parallel.planner.layout import Layout

REPLICATE, SHARD, EXPERT_SHARD, EXPERT, TENSOR = "replicate", "shard", "expert_shard", "expert", "tensor"


@dataclass(frozen=True)
class Meshes:
    """The grids of a layout.

    Attributes:
        layout: what they were built from.
        dense: ``(replicate, shard, tensor)``.
        sparse: ``(replicate, expert_shard, expert, tensor)``.
        data: ``(data_parallel, tensor_parallel)``, the names that Lightning gives to these two.
    """

    layout: Layout
    dense: DeviceMesh
    sparse: DeviceMesh
    data: DeviceMesh

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


class World:
    """All ranks in a row, and the grid of data ranks and tensor-parallel partners, known before there is a model.

    Args:
        device_type: "cpu" or "cuda".
        tensor_parallel_size: partners, next to each other, that read the same data.

    Attributes:
        all: ``(world,)``.
        data: ``(data_parallel, tensor_parallel)``, the names that Lightning gives to these two.
    """

    def __init__(self, device_type: str, tensor_parallel_size: int) -> None:
        size = dist.get_world_size()
        self.all = init_device_mesh(device_type, (size,), mesh_dim_names=("world",))
        shape = (size // tensor_parallel_size, tensor_parallel_size)
        self.data = self.all._unflatten(0, shape, ("data_parallel", "tensor_parallel"))


def build_meshes(layout: Layout, device_type: str, world: World | None = None) -> Meshes:
    """The grids of `layout` over all ranks of the default process group.

    Args:
        layout: how many ranks share what.
        device_type: "cpu" or "cuda".
        world: the ranks, where a part of the model was divided over them before; None = made here.

    Raises:
        UserError: if the layout is for another number of processes.
    """
    if dist.get_world_size() != layout.devices:
        raise UserError(
            f"a layout must be for the processes there are: got one for {layout.devices}, there are "
            f"{dist.get_world_size()}. Build it with devices={dist.get_world_size()}."
        )
    tensor, expert = layout.tensor_parallel_size, layout.expert_parallel_size
    if layout.zero_stage < 2:
        replicate, shard = layout.data_parallel_size, 1
        sparse = (layout.data_parallel_size // expert, 1, expert, tensor)
    else:
        replicate, shard = layout.replicas, layout.shard_size
        sparse = (layout.replicas, layout.shard_size // expert, expert, tensor)
    world = world or World(device_type, tensor)
    return Meshes(
        layout,
        dense=world.all._unflatten(0, (replicate, shard, tensor), (REPLICATE, SHARD, TENSOR)),
        sparse=world.all._unflatten(0, sparse, (REPLICATE, EXPERT_SHARD, EXPERT, TENSOR)),
        data=world.data,
    )
