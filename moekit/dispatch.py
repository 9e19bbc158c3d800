"""Dispatch: bring tokens to their experts and results back.

A dispatcher turns a `Routing` into rows grouped by expert and, after the experts, sums the weighted results for each
token. Both here are local to a process.

- `PackedDispatcher`: exactly the rows that are kept, one after the other. No padding, any load; the number of rows
  depends on data.
- `PaddedDispatcher`: C slots for each expert. Static shapes (`torch.compile(fullgraph=True)`, equal all-to-all
  splits), needs a capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moekit.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way to the experts.

    Attributes:
        rows: Float[R, D] sorted by expert (packed) or Float[E, C, D] (padded).
        counts: Int64[E] rows of each expert (packed), or None (padded).
        handle: what `combine` needs; opaque to everyone else.
    """

    rows: Tensor
    counts: Tensor | None
    handle: Any


class Dispatcher(Protocol):
    """Groups rows by expert and brings results back. Not a module: it has no parameters."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Group the rows of ``x`` Float[T, D] by expert."""
        ...

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Float[T, D]: the weighted sum of each token's results, in float32; zeros where nothing was kept."""
        ...


class PackedDispatcher:
    """Rows without padding, for any routing, with or without capacity."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Gather the kept rows, sorted by expert."""
        kept, e = routing.kept, routing.num_experts
        counts = torch.zeros(e, dtype=torch.int64, device=x.device)
        counts = counts.index_add(0, routing.expert, kept.to(torch.int64))
        start = counts.cumsum(0) - counts
        # An expert's kept assignments hold the places 0..n-1 of its queue, so the row of each is known without a sort.
        row = start[routing.expert] + routing.position
        total = int(counts.sum()) if x.device.type != "meta" else routing.token.numel()
        if total == routing.token.numel():
            assignment = torch.empty_like(row).scatter(0, row, torch.arange(total, device=x.device))
        else:
            index = kept.nonzero().squeeze(1)
            assignment = torch.empty(total, dtype=torch.int64, device=x.device).scatter(0, row[index], index)
        token = routing.token[assignment]
        return Dispatched(x.index_select(0, token), counts, (assignment, token))

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Add every row, times its weight, to its token."""
        assignment, token = handle
        weight = routing.weight.index_select(0, assignment)
        wide = torch.promote_types(y.dtype, torch.float32)
        out = torch.zeros(routing.num_tokens, y.shape[1], dtype=wide, device=y.device)
        return out.index_add(0, token, y.to(wide) * weight.to(wide)[:, None])


class PaddedDispatcher:
    """C slots for each expert; slots without a token hold zeros."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Scatter the kept rows into their slots.

        Raises:
            ValueError: if the routing is dropless: the number of slots would depend on data.
        """
        capacity = routing.capacity
        if capacity is None:
            raise ValueError(
                "PaddedDispatcher needs a routing with a capacity: got a dropless one. Give the router a Capacity "
                "for this phase, or use PackedDispatcher."
            )
        slots = routing.num_experts * capacity
        # One scratch slot behind the real ones takes everything that is not kept: no branch, no data-dependent shape.
        slot = torch.where(routing.kept, routing.expert * capacity + routing.position, slots)
        source = torch.full((slots + 1,), routing.num_tokens, dtype=torch.int64, device=x.device)
        source = source.scatter(0, slot, routing.token)[:slots]
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        rows = padded.index_select(0, source).view(routing.num_experts, capacity, x.shape[1])
        return Dispatched(rows, None, slot)

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Gather each assignment's slot, weigh it, add it to its token."""
        wide = torch.promote_types(y.dtype, torch.float32)
        flat = torch.cat([y.flatten(0, 1), y.new_zeros(1, y.shape[-1])])
        weight = torch.where(routing.kept, routing.weight, 0.0).to(wide)
        rows = flat.index_select(0, handle).to(wide) * weight[:, None]
        out = torch.zeros(routing.num_tokens, y.shape[-1], dtype=wide, device=y.device)
        return out.index_add(0, routing.token, rows)
