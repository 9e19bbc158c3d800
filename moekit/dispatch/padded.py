"""Padded dispatch: the same number of slots for each expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.dispatch.base import Dispatched, ExchangeDispatcher
from moekit.dispatch.rows import add, take
from moekit.routing import Routing


class PaddedDispatcher(ExchangeDispatcher):
    """C slots for each expert; slots without a token hold zeros.

    Across ranks capacity is that of each: an expert has C slots for the tokens of every rank (GShard's groups), which
    are sent in equal shares. Where ranks have different numbers of tokens it is the largest C of the group.
    """

    def dispatch_async(self, x: Tensor, routing: Routing) -> Callable[[], Dispatched]:
        """Scatter the kept rows into their slots: Float[E, C, D]; across W ranks Float[E / W, W * C, D].

        Raises:
            ValueError: if the routing is dropless: the number of slots would depend on data.
        """
        capacity = routing.capacity
        if capacity is None:
            raise ValueError(
                "PaddedDispatcher needs a routing with a capacity: got a dropless one. Give the router a Capacity "
                "for this phase, or use PackedDispatcher."
            )
        if self.exchange is not None:
            capacity = self.exchange.largest(capacity, x.device)
        slots = routing.num_experts * capacity
        # One scratch slot behind the real ones takes everything that is not kept: no branch, no data-dependent shape.
        slot = torch.where(routing.kept, routing.expert * capacity + routing.position, slots)
        source = torch.full((slots + 1,), routing.num_tokens, dtype=torch.int64, device=x.device)
        source = source.scatter(0, slot, routing.token)[:slots]
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        rows = take(padded, source, routing.choices).view(routing.num_experts, capacity, x.shape[1])
        if self.exchange is None:
            return lambda: Dispatched(rows, None, slot)
        w, here, dim = self.exchange.size, routing.num_experts // self.exchange.size, x.shape[1]
        wait = self.exchange.send_equal_async(rows.view(w, here, capacity, dim))
        return lambda: Dispatched(wait().transpose(0, 1).reshape(here, w * capacity, dim), None, slot)

    def combine(self, y: Tensor, routing: Routing, handle: Any) -> Tensor:
        """Gather each assignment's slot, weigh it, add it to its token."""
        if self.exchange is not None:
            w, (here, slots, dim) = self.exchange.size, y.shape
            y = self.exchange.send_equal(y.reshape(here, w, slots // w, dim).transpose(0, 1)).flatten(0, 1)
        wide = torch.promote_types(y.dtype, torch.float32)
        flat = torch.cat([y.flatten(0, 1), y.new_zeros(1, y.shape[-1])])
        weight = torch.where(routing.kept, routing.weight, 0.0).to(wide)
        rows = flat.index_select(0, handle).to(wide) * weight[:, None]
        if routing.choices is not None:
            return rows.view(routing.choices, routing.num_tokens, y.shape[-1]).sum(0)
        return add(rows, routing.token, routing.num_tokens, None)
