"""What a hash router looks at: the token, the one before, the next, two tokens together, or the position.

Every key turns a `RoutingContext` into whole numbers 0..num_keys-1, which a table sends to experts.

Source: arXiv:2106.04426.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moekit.functional.eager import is_symbolic
from moekit.functional.hash_tables import hash_ids
from moekit.routing import RoutingContext


class HashKey(Protocol):
    """Names a number for every token.

    Attributes:
        looks_ahead: whether the number tells something about later tokens.
    """

    looks_ahead: ClassVar[bool]

    @property
    def num_keys(self) -> int:
        """How many different numbers there are."""

    def __call__(self, context: RoutingContext) -> Tensor:
        """Int64[T] in 0..num_keys-1; any of them at padding."""


@dataclass(frozen=True)
class _OneToken:
    """A token of the context.

    Attributes:
        vocab_size: V, ids are 0..V-1.
    """

    vocab_size: int
    looks_ahead: ClassVar[bool] = False
    field: ClassVar[str]

    @property
    def num_keys(self) -> int:
        return self.vocab_size

    def __call__(self, context: RoutingContext) -> Tensor:
        return ids_of(context, self.field, self.vocab_size)


class CurrentToken(_OneToken):
    """The token itself, one of `vocab_size`."""

    field = "token_ids"


class PreviousToken(_OneToken):
    """The token before, one of `vocab_size`; before the first one that is the padding id."""

    field = "previous_ids"


class NextToken(_OneToken):
    """The token after, one of `vocab_size`: in a language model the answer itself, which no generation can ask."""

    field = "next_ids"
    looks_ahead = True


@dataclass(frozen=True)
class Bigram:
    """The token before and the token, hashed together into buckets: V * V pairs would need too large a table.

    Attributes:
        vocab_size: V.
        buckets: number of buckets; pairs that share a bucket share an expert.
        seed: seed of the hash.
    """

    vocab_size: int
    buckets: int = 1 << 16
    seed: int = 0
    looks_ahead: ClassVar[bool] = False

    @property
    def num_keys(self) -> int:  # noqa: D102
        return self.buckets

    def bucket(self, previous_ids: Tensor, token_ids: Tensor) -> Tensor:
        """Int64: the bucket of each pair."""
        return hash_ids(previous_ids, token_ids, seed=self.seed) % self.buckets

    def __call__(self, context: RoutingContext) -> Tensor:  # noqa: D102
        previous = ids_of(context, "previous_ids", self.vocab_size)
        return self.bucket(previous, ids_of(context, "token_ids", self.vocab_size))


@dataclass(frozen=True)
class TokenPosition:
    """The place in the sequence.

    Attributes:
        max_length: places are 0..max_length-1.
    """

    max_length: int
    looks_ahead: ClassVar[bool] = False

    @property
    def num_keys(self) -> int:  # noqa: D102
        return self.max_length

    def __call__(self, context: RoutingContext) -> Tensor:  # noqa: D102
        return ids_of(context, "position", self.max_length)


def ids_of(context: RoutingContext, name: str, limit: int) -> Tensor:
    """Int64[T]: the field `name` of `context`, 0 at padding, which may hold anything.

    Raises:
        ValueError: if the field is missing, or on a CPU if it holds a number that is not in 0..limit-1.
    """
    ids = getattr(context, name)
    if ids is None:
        hint = (
            "Nothing knows the next token while text is generated: an oracle cannot be asked there"
            if name == "next_ids"
            else f"Pass one per token, for example RoutingContext({name}=ids)"
        )
        raise ValueError(f"this hash needs RoutingContext.{name}: got None. {hint}.")
    return known_ids(
        ids,
        context.mask,
        limit,
        f"RoutingContext.{name} must be in 0..{limit - 1} for this hash: got {{}}. Build the table for "
        f"{'longer sequences' if name == 'position' else 'the whole vocabulary'}.",
    )


def known_ids(ids: Tensor, mask: Tensor | None, limit: int, message: str) -> Tensor:
    """Int64[T]: ``ids`` Int[T], 0 at padding.

    Raises:
        ValueError: with `message` about the id that is out of 0..limit-1, on a CPU.
    """
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    # A look at the ids makes a GPU wait, breaks a graph, and vmap refuses it: torch's own check has to do there.
    if ids.device.type == "cpu" and not is_symbolic() and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise ValueError(message.format(low if low < 0 else high))
    return ids.to(torch.int64)
