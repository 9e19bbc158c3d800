"""Packed dispatch: exactly the rows that are kept, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.dispatch import once_per_rank
from moekit.dispatch.base import Dispatched, ExchangeDispatcher
from moekit.dispatch.exchange import Route, transpose_blocks
from moekit.dispatch.rows import add, take
from moekit.functional.eager import is_symbolic
from moekit.functional.few import is_few
from moekit.kernels.host_counts import on_host, remember
from moekit.kernels.listed_rows import sum_rows, take_rows
from moekit.routing import Routing


@dataclass(frozen=True)
class _Handle:
    """Which assignment and which token each row of this rank is, the route to the experts, and whether rows are empty.

    The rows of what is not kept stand behind the others where the number of rows must not depend on data.
    """

    assignment: Tensor
    token: Tensor
    route: Route | None
    padded: bool = False
    row: Tensor | None = None
    """The row of each assignment, where the list is choice-major, all are kept and a CPU computes."""


@dataclass(frozen=True)
class _Few:
    """The row of each assignment of a choice-major list, all of which are kept."""

    row: Tensor


class PackedDispatcher(ExchangeDispatcher):
    """Rows without padding, for any routing, with or without capacity.

    Across ranks each sends what it has: loads, batches and numbers of rows may differ, and any of them may be zero.
    Where tokens have several choices, a token travels once to a rank (`moekit.dispatch.once_per_rank`).

    In a graph of `torch.compile` or `torch.export`, and where `torch.func` transforms, the number of rows must be known
    without a look at data. There every assignment has a row: those that are not kept are zeros, which follow the last
    expert's rows and weigh nothing.
    """

    def dispatch_async(self, x: Tensor, routing: Routing) -> Callable[[], Dispatched]:
        """Gather the kept rows, sorted by expert; across ranks, by this rank's experts."""
        if self.exchange is not None and routing.choices != 1:
            return once_per_rank.dispatch_async(x, routing, self.exchange)
        leaving = self._sorted(x, routing)
        if self.exchange is None:
            return lambda: leaving
        handle, route = leaving.handle, leaving.handle.route
        wait = route.send_async(leaving.rows)

        def arrived() -> Dispatched:
            rows = transpose_blocks(wait(), route.received)
            counts = remember(route.received.sum(0), on_host(route.received).sum(0))  # read with the messages' sizes
            return Dispatched(rows, counts, handle)

        return arrived

    def _sorted(self, x: Tensor, routing: Routing) -> Dispatched:
        """The kept rows sorted by expert, before they are sent."""
        if self.exchange is None and routing.choices and routing.all_kept and is_few(routing.expert):
            return _dispatch_few(x, routing)
        kept, e = routing.kept, routing.num_experts
        counts = torch.zeros(e, dtype=torch.int64, device=x.device)
        counts = counts.index_add(0, routing.expert, kept.to(torch.int64))
        route = None if self.exchange is None else self.exchange.open(counts.view(self.exchange.size, -1))
        start = counts.cumsum(0) - counts
        # An expert's kept assignments hold the places 0..n-1 of its queue, so the row of each is known without a sort.
        row = start[routing.expert] + routing.position
        listed = routing.token.numel()
        padded = False
        if route is not None:
            total = route.rows
        elif routing.all_kept or x.device.type == "meta":
            total = listed
        elif is_symbolic():
            total, padded = listed, True
            row = torch.where(kept, row, counts.sum() + (~kept).cumsum(0) - 1)
            counts = torch.cat([counts[:-1], listed - counts[:-1].sum(0, keepdim=True)])
        else:
            total = int(on_host(counts).sum())
        number = torch.arange(listed, device=x.device)
        if total == listed:
            assignment = torch.empty_like(row).scatter(0, row, number)
        else:
            # One scratch row behind the real ones takes what is not kept.
            row = torch.where(kept, row, total)
            assignment = torch.empty(total + 1, dtype=torch.int64, device=x.device).scatter(0, row, number)[:total]
        token = routing.token[assignment]
        plain = type(x) is Tensor and x.device.type == "cpu"
        plain = plain and not is_symbolic()
        if plain and route is None and total == listed and routing.choices:
            return Dispatched(
                take_rows(x, token, row, routing.choices), counts, _Handle(assignment, token, None, row=row)
            )
        rows = take(x, token, routing.choices)
        if padded:
            rows = rows.masked_fill(~kept[assignment][:, None], 0.0)
        return Dispatched(rows, counts, _Handle(assignment, token, route, padded))

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Add every row, times its weight, to its token."""
        if isinstance(handle, once_per_rank.Parcels):
            return once_per_rank.combine(y, routing, handle)
        if isinstance(handle, _Few):
            return _combine_few(y, routing, handle.row)
        if handle.route is not None:
            y = handle.route.back(transpose_blocks(y, handle.route.received.t()))
        wide = torch.promote_types(y.dtype, torch.float32)
        if handle.row is not None:
            assert routing.choices is not None
            return sum_rows(y.to(wide), routing.weight.to(wide), handle.token, handle.row, routing.choices)
        weight = torch.where(routing.kept, routing.weight, 0.0) if handle.padded else routing.weight
        weight = weight.index_select(0, handle.assignment)
        return add(y.to(wide) * weight.to(wide)[:, None], handle.token, routing.num_tokens, routing.choices)


def _dispatch_few(x: Tensor, routing: Routing) -> Dispatched:
    """`PackedDispatcher.dispatch` of few assignments, sorted and counted one by one."""
    experts = routing.expert.tolist()
    order = sorted(range(len(experts)), key=experts.__getitem__)
    counts, row = [0] * routing.num_experts, [0] * len(experts)
    for place, assignment in enumerate(order):
        row[assignment] = place
        counts[experts[assignment]] += 1
    tokens = [assignment % routing.num_tokens for assignment in order]
    token, back, count = (
        torch.tensor(numbers, dtype=torch.int64, device=x.device) for numbers in (tokens, row, counts)
    )
    return Dispatched(x.index_select(0, token), count, _Few(back))


def _combine_few(y: Tensor, routing: Routing, row: Tensor) -> Tensor:
    """The weighted sum by a gather: rows come back into the order of the list."""
    wide = torch.promote_types(y.dtype, torch.float32)
    listed = y.index_select(0, row).to(wide).mul_(routing.weight.to(wide)[:, None])
    if routing.choices == 1:
        return listed
    return listed.view(routing.choices or 1, routing.num_tokens, y.shape[1]).sum(0)
