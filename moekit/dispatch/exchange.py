"""Exchange: how rows travel between the ranks that share the experts of a layer.

Every rank of a group holds as many experts as the others. A rank opens a `Route` by telling how many rows it has for
every expert; rows are then sent, computed and brought back along it. All ranks must make the same calls in the same
order, also a rank that has no row for anybody.

What is sent "async" is on its way when the call returns: the caller computes something else and then waits. In the
backward pass the gradients travel back likewise, while that something's gradients are computed.

- `AllToAll`: one collective over the whole group.
- `TwoLevelAllToAll`: first inside each node, then between nodes, where a message holds the rows of the whole node. The
  number of messages between nodes falls from the square of the ranks to that of the nodes, times the ranks of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from moekit.kernels.host_counts import remember

Wait = Callable[[], Tensor]
"""Waits for rows that are on their way, and returns them. To be called once, by all ranks in the same order."""


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

    def send_async(self, rows: Tensor) -> Wait:
        """`send`, which may return while rows are on their way."""
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

    def send_equal_async(self, rows: Tensor) -> Wait:
        """`send_equal`, which may return while rows are on their way."""
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


Way = tuple[list[int], list[int], dist.ProcessGroup]
"""Rows received from each rank, rows sent to each, and between whom."""


class _Issue(torch.autograd.Function):
    """Put rows on their way: returns what stands for them in autograd, and what must not be read before `_Wait`.

    Autograd takes up what was computed last first. So whatever is computed between `_Issue` and `_Wait` has its
    backward between the issue of the gradients, in `_Wait`, and the wait for them, here.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        travelling = _issue(rows, way)
        ctx.mark_non_differentiable(travelling)
        # Of the shape that the gradient has when it has travelled back, and without memory.
        return rows.new_empty((1,) * rows.dim()).expand(rows.shape), travelling

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(grads[0]), None


class _Wait(torch.autograd.Function):
    """Wait for the rows of `_Issue`."""

    @staticmethod
    def forward(ctx: Any, stands_for: Tensor, travelling: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return wait_tensor(travelling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        received, sent, group = ctx.way
        if torch.is_grad_enabled() or torch.is_anomaly_enabled():  # by whom gradients are read before the wait
            return all_to_all(grads[0], sent, received, group), None, None
        return _issue(grads[0].contiguous(), (sent, received, group)), None, None


def _issue(rows: Tensor, way: Way) -> Tensor:
    received, sent, group = way
    out: Tensor = torch.ops._c10d_functional.all_to_all_single(rows, received, sent, group.group_name)
    return out


def all_to_all_async(
    rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup, overlap: bool = True
) -> Wait:
    """`all_to_all`, whose rows travel until what is returned is called.

    They have come at once without `overlap`, in a graph of `torch.compile`, whose compiler orders collectives itself,
    and where autograd records, but not these rows: a checkpoint may then end its recomputation before the wait.
    """
    untracked = torch.is_grad_enabled() and not rows.requires_grad
    if not overlap or untracked or torch.compiler.is_compiling():
        out = all_to_all(rows, received, sent, group)
        return lambda: out
    if received is None or sent is None:
        received = sent = [rows.shape[0] // group.size()] * group.size()
    way = received, sent, group
    stands_for, travelling = _Issue.apply(rows.contiguous(), way)
    return lambda: _Wait.apply(stands_for, travelling, way)


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
    overlap: bool

    @property
    def rows(self) -> int:
        return sum(self.sent_rows)

    def send(self, rows: Tensor) -> Tensor:
        return all_to_all(rows, self.received_rows, self.sent_rows, self.group)

    def send_async(self, rows: Tensor) -> Wait:
        return all_to_all_async(rows, self.received_rows, self.sent_rows, self.group, self.overlap)

    def back(self, rows: Tensor) -> Tensor:
        return all_to_all(rows, self.sent_rows, self.received_rows, self.group)


class AllToAll(Exchange):
    """Rows go straight to the rank that holds their expert.

    Args:
        group: the ranks that share the experts.
        overlap: whether what is sent "async" travels while something else is computed; False = it has come at once,
            with the same results.

    Source: arXiv:2006.16668 section 3.2.
    """

    def __init__(self, group: dist.ProcessGroup, *, overlap: bool = True) -> None:
        self.group, self.size, self.groups, self.overlap = group, group.size(), (group,), overlap

    def open_together(self, *counts: Tensor) -> list[Route]:
        """See `Exchange.open_together`."""
        told = torch.cat(counts, 1)
        received = _counts_to(told, self.group)
        # One copy for all that is asked of them.
        numbers = torch.stack([told, received]).cpu()  # host read: the sizes of messages
        widths = [table.shape[1] for table in counts]
        routes: list[Route] = []
        for came, sent, known in zip(received.split(widths, 1), *(n.split(widths, 1) for n in numbers), strict=True):
            sizes = sent.sum(1).tolist(), known.sum(1).tolist()
            routes.append(_Direct(remember(came, known), self.group, *sizes, self.overlap))
        return routes

    def send_equal(self, rows: Tensor) -> Tensor:
        """See `Exchange.send_equal`."""
        return all_to_all(rows, None, None, self.group)

    def send_equal_async(self, rows: Tensor) -> Wait:
        """See `Exchange.send_equal_async`."""
        return all_to_all_async(rows, None, None, self.group, self.overlap)


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
        return self.send_async(rows)()

    def send_async(self, rows: Tensor) -> Wait:
        here = self.inner.send(transpose_blocks(rows, self.by_rank))
        return self.outer.send_async(transpose_blocks(here, self.between))

    def back(self, rows: Tensor) -> Tensor:
        here = transpose_blocks(self.outer.back(rows), self.between.t())
        return transpose_blocks(self.inner.back(here), self.by_rank.t())


class TwoLevelAllToAll(Exchange):
    """Rows go first to the rank of the own node that has the number of their destination, then between nodes.

    Args:
        inner: the ranks of this node that belong to the group, in order.
        outer: the ranks with this one's number in all nodes, in order. Rank (node, number) of the whole group is
            ``node * inner.size() + number``.
        overlap: whether the way between nodes overlaps, as that of `AllToAll`.

    Source: the hierarchical all-to-all of arXiv:2201.05596 section 5.2.
    """

    def __init__(self, inner: dist.ProcessGroup, outer: dist.ProcessGroup, *, overlap: bool = True) -> None:
        self.inner, self.outer = AllToAll(inner), AllToAll(outer, overlap=overlap)
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
        within = sent.sum((0, 2)).tolist(), here.sum((1, 2)).tolist()
        between = here.sum((0, 2)).tolist(), there.sum((1, 2)).tolist()
        inner = _Direct(held, self.inner.group, *within, overlap=False)
        outer = _Direct(arrived, self.outer.group, *between, self.outer.overlap)
        received = remember(arrived.flatten(0, 1), there.flatten(0, 1))
        return _TwoLevel(received, inner, outer, by_node.sum(2), held.sum(2))

    def send_equal(self, rows: Tensor) -> Tensor:
        """See `Exchange.send_equal`."""
        return self.send_equal_async(rows)()

    def send_equal_async(self, rows: Tensor) -> Wait:
        """See `Exchange.send_equal_async`."""
        nodes, local, rest = self.outer.size, self.inner.size, rows.shape[1:]
        here = self.inner.send_equal(rows.view(nodes, local, *rest).transpose(0, 1))
        there = self.outer.send_equal_async(here.transpose(0, 1))
        return lambda: there().reshape(self.size, *rest)
