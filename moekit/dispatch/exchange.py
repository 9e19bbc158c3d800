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
        return self.open_together(counts)[0]

    def open_together(self, *counts: Tensor) -> list[Route]:
        """As many routes as tables of counts, Int64[W, n] each; all are told at once."""
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

    def open_together(self, *counts: Tensor) -> list[Route]:
        """See `Exchange.open_together`."""
        told = torch.cat(counts, 1)
        received = _counts_to(told, self.group)
        # One copy for all that is asked of them.
        numbers = torch.stack([told, received]).cpu()  # host read: the sizes of messages
        widths = [table.shape[1] for table in counts]
        routes: list[Route] = []
        for came, sent, known in zip(received.split(widths, 1), *(n.split(widths, 1) for n in numbers), strict=True):
            routes.append(_Direct(remember(came, known), self.group, sent.sum(1).tolist(), known.sum(1).tolist()))
        return routes

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

    def open_together(self, *counts: Tensor) -> list[Route]:
        """See `Exchange.open_together`."""
        nodes, local = self.outer.size, self.inner.size
        by_node = torch.cat(counts, 1).unflatten(0, (nodes, local))
        held = _counts_to(by_node.transpose(0, 1), self.inner.group)  # [rank of origin, node of destination, n]
        arrived = _counts_to(held.transpose(0, 1), self.outer.group)  # [node of origin, rank of origin, n]
        tables = (by_node, held, arrived)
        numbers = torch.stack([table.flatten() for table in tables]).cpu()  # host read: the sizes of messages
        known = [number.view(table.shape) for number, table in zip(numbers, tables, strict=True)]
        widths = [table.shape[1] for table in counts]
        parts = zip(*(table.split(widths, 2) for table in (*tables, *known)), strict=True)
        return [self._route(*part) for part in parts]

    def _route(self, by_node: Tensor, held: Tensor, arrived: Tensor, *known: Tensor) -> Route:
        sent, here, there = known
        inner = _Direct(held, self.inner.group, sent.sum((0, 2)).tolist(), here.sum((1, 2)).tolist())
        outer = _Direct(arrived, self.outer.group, here.sum((0, 2)).tolist(), there.sum((1, 2)).tolist())
        received = remember(arrived.flatten(0, 1), there.flatten(0, 1))
        return _TwoLevel(received, inner, outer, by_node.sum(2), held.sum(2))

    def send_equal(self, rows: Tensor) -> Tensor:
        """See `Exchange.send_equal`."""
        nodes, local, rest = self.outer.size, self.inner.size, rows.shape[1:]
        here = self.inner.send_equal(rows.view(nodes, local, *rest).transpose(0, 1))
        there = self.outer.send_equal(here.transpose(0, 1))
        return there.reshape(self.size, *rest)
