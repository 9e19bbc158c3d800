"""Hash layers: a fixed table, not a learned router, sends each token to its expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moekit.routers.hash_keys import CurrentToken, HashKey
from moekit.routers.queueing import batch_capacity, routing_of_choices
from moekit.routing import Capacity, Compensation, Router, Routing, RoutingContext


class TableRouter(Router):
    """A table that names experts, with weight 1: a buffer, so it is in the checkpoint and moves with the module.

    Args:
        num_experts: E.
        table: Int64 of any shape.
        capacity: slots per expert; None = dropless.
        looks_ahead: whether what is looked up tells later tokens.
        allow_future: accept that, or random priority, in a causal decoder.
    """

    expert_ids: ClassVar[tuple[str, ...]] = ("table",)
    dim = None
    table: Tensor

    def __init__(
        self, num_experts: int, table: Tensor, capacity: Capacity | None, *, looks_ahead: bool, allow_future: bool
    ) -> None:
        super().__init__()
        # A copy beside the buffer, so that `reset_parameters` brings a module made on the meta device to life.
        self._given = table
        self.num_experts, self.capacity = num_experts, batch_capacity(capacity, type(self).__name__)
        self.looks_ahead = looks_ahead or self.capacity.looks_ahead
        self.allow_future = allow_future
        self.register_buffer("table", torch.empty(table.shape, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table with what the constructor was given."""
        if self.table.device.type != "meta":
            self.table.copy_(self._given)

    def compensation(self, copies: float, state: Mapping[str, Tensor] | None = None) -> Compensation:
        """See `Router.compensation`: the table names one of the copies, with weight 1."""
        return Compensation()

    def routing(self, expert: Tensor, context: RoutingContext) -> Routing:
        """The `Routing` of ``expert`` Int64[T, K], or Int64[T]."""
        weight = torch.ones(expert.shape, dtype=torch.float32, device=expert.device)
        return routing_of_choices(
            expert, weight, self.num_experts, mask=context.mask, capacity=self.capacity, training=self.training
        )


class HashRouter(TableRouter):
    """A table from key to expert; weight 1, no loss, nothing learned.

    The key is the token's id, or whatever `key` makes of the context; hidden states are not looked at.

    With K tables (MultiHash) every token is sent to K experts, one by each table: table m chooses among the experts
    ``m * E .. m * E + E - 1``. With experts of hidden size F / K (`moekit.experts.MultiHashMLP`) the layer is a
    feed-forward whose hidden dimension is cut into K segments, each with parameters hashed apart.

    Args:
        num_experts: E, what a table chooses from. The router has K * E experts if there are K tables.
        table: Int64[num_keys], or Int64[K, num_keys]; made by `moekit.functional.hash_tables`, or your own.
        key: what is looked up; None = `CurrentToken`.
        capacity: slots per expert; dropless by default, as in the paper.
        allow_future: accept a key that tells later tokens (`NextToken`) or random priority in a causal decoder.

    Raises:
        ValueError: if the table does not fit the key or names an expert that does not exist, or `capacity` is a
            `SequenceCapacity`; in forward, if the context lacks what the key reads or, on a CPU, holds an id out of
            range.

    Source: arXiv:2106.04426 (hash layer; MultiHash). Differs: `moekit.experts.MultiHashMLP`
        says how segments are joined.
    """

    def __init__(
        self,
        num_experts: int,
        table: Tensor,
        *,
        key: HashKey | None = None,
        capacity: Capacity | None = None,
        allow_future: bool = False,
    ) -> None:
        capacity = batch_capacity(capacity, "HashRouter")
        key = key or CurrentToken(table.shape[-1])
        _check_table(table, key, num_experts)
        if capacity.priority == "probability":
            raise ValueError(
                'HashRouter cannot serve tokens by probability, for it has none. Use priority="position" or "random".'
            )
        tables = table.detach().to("cpu", torch.int64).reshape(-1, key.num_keys).clone()
        super().__init__(
            num_experts * len(tables), tables, capacity, looks_ahead=key.looks_ahead, allow_future=allow_future
        )
        self.key, self.num_tables, self.experts_per_table = key, len(tables), num_experts
        vocab_size = getattr(key, "vocab_size", None)
        if vocab_size is not None:
            self.vocab_size = vocab_size

    @property
    def k(self) -> int:
        """Experts per token: one by each table."""
        return self.num_tables

    @property
    def expert_dims(self) -> Mapping[str, int] | None:  # type: ignore[override]
        """No tensor counts experts. With several tables each numbers its own, and none can be taken out of all."""
        return {} if self.num_tables == 1 else None

    def extra_repr(self) -> str:  # noqa: D102
        return f"num_experts={self.num_experts}, tables={self.num_tables}, key={self.key}, capacity={self.capacity}"

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:  # noqa: D102
        context = context or RoutingContext()
        first = torch.arange(self.num_tables, device=x.device) * self.experts_per_table
        return self.routing(self.table[:, self.key(context)].t() + first, context)


def _check_table(table: Tensor, key: HashKey, num_experts: int) -> None:
    if table.is_meta:
        raise ValueError(
            "a hash table must hold numbers: got one on the meta device. Make the table, or the counts it comes from, "
            "outside of torch.device('meta')."
        )
    if table.ndim not in (1, 2) or table.is_floating_point() or table.dtype == torch.bool or 0 in table.shape:
        raise ValueError(
            f"a hash table must be Int64[num_keys] or Int64[K, num_keys]: got {table.dtype} of shape "
            f"{tuple(table.shape)}."
        )
    if table.shape[-1] != key.num_keys:
        raise ValueError(
            f"a hash table must have one entry per key: got {table.shape[-1]} entries for the {key.num_keys} keys of "
            f"{key}. Make the table with num_keys={key.num_keys}."
        )
    low, high = int(table.min()), int(table.max())
    if low < 0 or high >= num_experts:
        raise ValueError(
            f"a hash table must name experts in 0..{num_experts - 1}: got {low if low < 0 else high}. Make it for "
            f"num_experts={num_experts}."
        )
