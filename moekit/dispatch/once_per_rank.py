"""Packed dispatch across ranks in which a token travels once to a rank, however many of its experts are there.

A *parcel* is a token on its way to a rank: its row, sent once. Beside the parcels goes a pair of numbers for every
assignment, its weight and which parcel it reads. The rank of the experts adds up what they make of a parcel and sends
one row back for it. Of k choices over W ranks, ``W * (1 - (1 - 1 / W) ** k)`` rows travel each way and not k.

Source: DeepSpeed's DeepEP transport measures 1.29 times for this alone under 16 GPUs on 2 nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.dispatch.base import Dispatched
from moekit.dispatch.exchange import Exchange, Route, transpose_blocks
from moekit.dispatch.rows import add, take
from moekit.kernels.host_counts import on_host, remember
from moekit.routing import Routing


@dataclass(frozen=True)
class Parcels:
    """What `combine` needs: this rank's parcels, and what its experts' rows are of the parcels that came.

    Attributes:
        token: Int64[P], the token of each parcel that this rank sends.
        route: the parcels' way.
        parcel: Int64[R], of each of this rank's expert rows the parcel that it read.
        weight: Float[R], what its result counts there.
        came: how many parcels came.
        ranks: W, how many parcels a token can have.
    """

    token: Tensor
    route: Route
    parcel: Tensor
    weight: Tensor
    came: int
    ranks: int


def dispatch_async(x: Tensor, routing: Routing, exchange: Exchange) -> Callable[[], Dispatched]:
    """Rows for this rank's experts, sorted by expert: see `moekit.dispatch.base.ExchangeDispatcher.dispatch_async`."""
    kept, tokens, device = routing.kept, routing.num_tokens, x.device
    here = routing.num_experts // exchange.size
    rank = routing.expert // here
    place = torch.where(
        kept, rank * tokens + routing.token, exchange.size * tokens
    )  # the last one for what is not kept
    wanted = torch.zeros(exchange.size * tokens + 1, dtype=torch.int64, device=device)
    wanted = wanted.scatter(0, place, 1)[:-1]
    parcels = wanted.view(exchange.size, tokens).sum(1, keepdim=True)
    counts = torch.zeros(routing.num_experts, dtype=torch.int64, device=device)
    counts = counts.index_add(0, routing.expert, kept.to(torch.int64))
    by_expert, by_parcel = exchange.open_together(counts.view(exchange.size, here), parcels)

    number = wanted.cumsum(0) - wanted  # of the parcel at each place
    slot = torch.where(wanted > 0, number, by_parcel.rows)
    listed = torch.arange(tokens, device=device).repeat(exchange.size)
    token = torch.empty(by_parcel.rows + 1, dtype=torch.int64, device=device).scatter(0, slot, listed)
    token = token[: by_parcel.rows]

    start = counts.cumsum(0) - counts
    row = torch.where(kept, start[routing.expert] + routing.position, by_expert.rows)
    order = torch.empty(by_expert.rows + 1, dtype=torch.int64, device=device)
    order = order.scatter(0, row, torch.arange(row.numel(), device=device))[: by_expert.rows]
    first = parcels.flatten().cumsum(0) - parcels.flatten()
    read = number[place[order]] - first[rank[order]]  # within the parcels for that rank
    notes = torch.stack([routing.weight[order].to(_wide(x)), read.to(_wide(x))], 1)

    notes = by_expert.send(notes)
    begin = by_parcel.received.flatten().cumsum(0) - by_parcel.received.flatten()
    size = int(on_host(by_expert.received).sum())
    offset = torch.repeat_interleave(begin, by_expert.received.sum(1), output_size=size)
    parcel = notes[:, 1].detach().to(torch.int64) + offset
    parcel = transpose_blocks(parcel, by_expert.received)
    weight = transpose_blocks(notes[:, 0], by_expert.received)
    wait = by_parcel.send_async(take(x, token, exchange.size))

    def arrived() -> Dispatched:
        rows = take(wait(), parcel, routing.choices)
        counts = remember(by_expert.received.sum(0), on_host(by_expert.received).sum(0))
        came = int(on_host(by_parcel.received).sum())
        return Dispatched(rows, counts, Parcels(token, by_parcel, parcel, weight, came, exchange.size))

    return arrived


def combine(y: Tensor, routing: Routing, handle: Parcels) -> Tensor:
    """The weighted sums: of a parcel where the experts are, in float32, and of its parcels at the token's rank."""
    wide = _wide(y)
    parts = add(y.to(wide) * handle.weight.to(wide)[:, None], handle.parcel, handle.came, routing.choices)
    parts = handle.route.back(parts.to(y.dtype))
    return add(parts.to(wide), handle.token, routing.num_tokens, handle.ranks)


def _wide(x: Tensor) -> torch.dtype:
    """Float32, or more: of it a number of a parcel is exact up to 16 million."""
    return torch.promote_types(x.dtype, torch.float32)
