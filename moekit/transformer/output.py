"""What stacks and models return: frozen dataclasses that are pytrees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekit.routing import Routing, register_pytree
from moekit.transformer.cache import DecoderCache


@dataclass(frozen=True)
class BlockOutput:
    """Result of one block: hidden states Float[B, S, D], and the routing where its feed-forward is sparse."""

    hidden: Tensor
    routing: Routing | None


@dataclass(frozen=True)
class StackOutput:
    """Result of a stack of blocks: hidden states Float[B, S, D], and one routing per sparse layer, first to last."""

    hidden: Tensor
    routings: tuple[Routing, ...]


@dataclass(frozen=True)
class DecoderOutput(StackOutput):
    """Result of a decoder: as `StackOutput`, and the cache that was given, now one step longer, or None."""

    cache: DecoderCache | None = None


register_pytree(BlockOutput)
register_pytree(StackOutput)
register_pytree(DecoderOutput, static=("cache",))
