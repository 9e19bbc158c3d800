"""Exchange: how rows travel between the ranks that share the experts of a layer.

Every rank of a group holds as many experts as the others. A rank opens a `Route` by telling how many rows it has for
every expert; rows are then sent, computed and brought back along it. All ranks must make the same calls in the same
order, also a rank that has no row for anybody.

- `AllToAll`: one collective over the whole group.
- `TwoLevelAllToAll`: first inside each node, then between nodes, where a message holds the rows of the whole node. The
  number of messages between nodes falls from the square of the ranks to that of the nodes, times the ranks of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from moekit.kernels.host_counts import remember


class Route(Protocol):
    """An open way to the ranks of a group and back."""

    @property
    def rows(self) -> int:
        """How many rows this rank sends."""
        ...

    @property
    def received(self) -> Tensor:
        """Int64[W, n], rows from each rank for each of this rank's n experts, on the device of the counts.

        To open the way they have been read: `moekit.kernels.on_host` knows them.
        """
        ...

    def send(self, rows: Tensor) -> Tensor:
        """Rows ordered by (rank, expert) of destination become rows ordered by (rank of origin, expert)."""
        ...

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `send`."""
        ...


class Exchange(Protocol):
    """Opens routes between the ranks of a group.

    Attributes:
        size: W, ranks in the group.
        groups: the process groups that together connect these ranks.
    """

    size: int
    groups: tuple[dist.ProcessGroup, ...]

    def open(self, counts: Tensor) -> Route:
        """Tell all ranks how many rows this one has for their experts: Int64[W, n]."""
        ...

    def send_equal(self, rows: Tensor) -> Tensor:
        """Float[W, ...] -> Float[W, ...]: block r goes to rank r; block r of the result came from it. Its own inverse.

        No counts are needed, so nothing is read from a device.
        """
        ...

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of the numbers that the ranks of the group hold."""
        # Groups that also work on the host ("cpu:gloo,cuda:nccl") are asked there, and no device waited for.
        if all("cpu" in dist.get_backend_config(group) for group in self.groups):
            device = torch.device("cpu")
        value = torch.tensor(number, device=device)
        for group in self.groups:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return int(value)  # host read, where a group has no form on the host


def all_to_all(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """``rows`` Float[R, ...], `sent` of them for each rank in turn, become those `received` from each.

    None = equal shares. The gradient travels back the same way.
    """
    out: Tensor = all_to_all_single_autograd(rows.contiguous(), received, sent, group)
    return wait_tensor(out)


def _counts_to(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Int64[W, ...]: row r goes to rank r; row r of the result came from it."""
    counts = counts.contiguous()
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


def transpose_blocks(rows: Tensor, sizes: Tensor) -> Tensor:
    """Rows in blocks of `sizes` Int64[A, B], ordered by (a, b), become rows in blocks ordered by (b, a)."""
    flat = sizes.reshape(-1)
    start = (flat.cumsum(0) - flat).view_as(sizes).t().reshape(-1)
    length = sizes.t().reshape(-1)
    shift = start - (length.cumsum(0) - length)
    index = torch.arange(rows.shape[0], device=rows.device)
    index = index + torch.repeat_interleave(shift, length, output_size=rows.shape[0])
    return rows.index_select(0, index)


@dataclass(frozen=True)
class _Direct:
    """One all-to-all."""

    received: Tensor
    group: dist.ProcessGroup
    sent_rows: list[int]
    received_rows: list[int]

    @property
    def rows(self) -> int:
        return sum(self.sent_rows)

    def send(self, rows: Tensor) -> Tensor:
        return all_to_all(rows, self.received_rows, self.sent_rows, self.group)

    def back(self, rows: Tensor) -> Tensor:
        return all_to_all(rows, self.sent_rows, self.received_rows, self.group)


class AllToAll(Exchange):
    """Rows go straight to the rank that holds their expert.

    Args:
        group: the ranks that share the experts.

    Source: arXiv:2006.16668 section 3.2.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.groups = group, group.size(), (group,)

    def open(self, counts: Tensor) -> Route:
        """See `Exchange.open`."""
        received = _counts_to(counts, self.group)
        # One copy for all that is asked of them.
        numbers = torch.cat([counts.sum(1), received.flatten()]).cpu()  # host read: the sizes of messages
        known = numbers[self.size :].view_as(received)
        remember(received, known)
        return _Direct(received, self.group, numbers[: self.size].tolist(), known.sum(1).tolist())

    def send_equal(self, rows: Tensor) -> Tensor:
        """See `Exchange.send_equal`."""
        return all_to_all(rows, None, None, self.group)


@dataclass(frozen=True)
class _TwoLevel:
    """An all-to-all inside the node, rows regrouped by node of destination, an all-to-all between nodes."""

    received: Tensor
    inner: _Direct
    outer: _Direct
    by_rank: Tensor  # Int64[nodes, ranks of a node]: rows for each destination, node outermost
    between: Tensor  # Int64[ranks of a node, nodes]: rows held after the first step, by rank of origin and node

    @property
    def rows(self) -> int:
        return self.inner.rows

    def send(self, rows: Tensor) -> Tensor:
        here = self.inner.send(transpose_blocks(rows, self.by_rank))
        return self.outer.send(transpose_blocks(here, self.between))

    def back(self, rows: Tensor) -> Tensor:
        here = transpose_blocks(self.outer.back(rows), self.between.t())
        return transpose_blocks(self.inner.back(here), self.by_rank.t())


class TwoLevelAllToAll(Exchange):
    """Rows go first to the rank of the own node that has the number of their destination, then between nodes.

    Args:
        inner: the ranks of this node that belong to the group, in order.
        outer: the ranks with this one's number in all nodes, in order. Rank (node, number) of the whole group is
            ``node * inner.size() + number``.

    Source: the hierarchical all-to-all of arXiv:2201.05596 section 5.2.
    """

    def __init__(self, inner: dist.ProcessGroup, outer: dist.ProcessGroup) -> None:
        self.inner, self.outer = AllToAll(inner), AllToAll(outer)
        self.size, self.groups = inner.size() * outer.size(), (inner, outer)

    def open(self, counts: Tensor) -> Route:
        """See `Exchange.open`."""
        nodes, local, n = self.outer.size, self.inner.size, counts.shape[1]
        by_node = counts.view(nodes, local, n)
        held = _counts_to(by_node.transpose(0, 1), self.inner.group)  # [rank of origin, node of destination, n]
        forwarded = held.transpose(0, 1)  # [node of destination, rank of origin, n]
        arrived = _counts_to(forwarded, self.outer.group)  # [node of origin, rank of origin, n]
        received = arrived.reshape(self.size, n)
        sizes = [by_node.sum((0, 2)), held.sum((1, 2)), forwarded.sum((1, 2)), received.flatten()]
        numbers = torch.cat(sizes).cpu()  # host read: the sizes of messages
        first, second, third, rest = numbers.split([local, local, nodes, received.numel()])
        known = rest.view_as(received)
        remember(received, known)
        inner = _Direct(held, self.inner.group, first.tolist(), second.tolist())
        outer = _Direct(arrived, self.outer.group, third.tolist(), known.view(nodes, -1).sum(1).tolist())
        return _TwoLevel(received, inner, outer, by_node.sum(2), held.sum(2))

    def send_equal(self, rows: Tensor) -> Tensor:
        """See `Exchange.send_equal`."""
        nodes, local, rest = self.outer.size, self.inner.size, rows.shape[1:]
        here = self.inner.send_equal(rows.view(nodes, local, *rest).transpose(0, 1))
        there = self.outer.send_equal(here.transpose(0, 1))
        return there.reshape(self.size, *rest)
