"""What a trace holds: the routing of every sparse layer in every forward, and the tokens that were routed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.errors import UserError
from moekit.functional.assignment import queue_positions
from moekit.routing import Routing

OF_TOKENS = ("ids", "language", "place", "sequence")
"""What is known of tokens, as whole numbers; beside them stands the mask."""


@dataclass(frozen=True, eq=False)
class TracedTokens:
    """The tokens that layers routed: those of an encoder, for example, which all its layers share.

    Attributes:
        num_tokens: T, padding included.
        mask: Bool[T], True = a real token; None = all are.
        ids: Int64[T], ids of a vocabulary; None where nobody said them, as in all that follow.
        language: Int64[T], `RoutingContext.task`, which moekit's transformers give the language.
        place: Int64[T], place in the sequence.
        sequence: Int64[T], the sequence of the batch.
    """

    num_tokens: int
    mask: Tensor | None = None
    ids: Tensor | None = None
    language: Tensor | None = None
    place: Tensor | None = None
    sequence: Tensor | None = None

    def same(self, other: TracedTokens) -> bool:
        """Whether they are equal in all that is known of them."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("mask", *OF_TOKENS)]
        return self.num_tokens == other.num_tokens and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )


@dataclass(frozen=True, eq=False)
class TracedLayer:
    """What the router of one sparse layer returned in one forward.

    Attributes:
        routing: the list of assignments in host memory, with losses and statistics as numbers without a gradient, and
            without `Routing.logits`.
        tokens: what is known of its tokens.
        weighed: whether the weights were recorded; else they are NaN.
    """

    routing: Routing
    tokens: TracedTokens
    weighed: bool = True


@dataclass(frozen=True, eq=False)
class TracedBatch:
    """One forward of a model.

    Attributes:
        step: optimizer steps that were done before it.
        task: name of the training task; "" = not known.
        training: whether the layers were in training mode.
        layers: by name, in the order of the forward.
        gradients: Float32[E] by layer, norm of the gradient of each expert, where it was recorded after this batch.
    """

    step: int
    task: str
    training: bool
    layers: Mapping[str, TracedLayer]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


def requeued(expert: Tensor, queued: Tensor, kept: Tensor, position: Tensor, num_experts: int) -> Tensor:
    """Int64[N]: places without gaps for a part or a sum of queues, in the order of `position`, kept ones first.

    Args:
        expert: Int64[N].
        queued: Bool[N].
        kept: Bool[N].
        position: numbers that order the assignments of an expert; equal ones stand in list order.
        num_experts: E.
    """
    order = torch.argsort(position, stable=True)
    order = order[torch.argsort(~kept[order], stable=True)]
    return queue_positions(expert, queued, num_experts, order)


def part_of(routing: Routing, rank: int, size: int) -> Routing:
    """The routing of one of `size` equal parts of the tokens, which follow each other in the batch.

    Who was kept stays kept and who was dropped stays dropped; places close up. The capacity is that of the whole, which
    is room enough.

    Raises:
        UserError: the tokens cannot be divided so.
    """
    if routing.num_tokens % size:
        raise UserError(
            f"a trace is shared by {size} processes in equal parts: a batch of {routing.num_tokens} tokens cannot be. "
            "Use as many processes as divide it."
        )
    length = routing.num_tokens // size
    chosen = ((routing.token >= rank * length) & (routing.token < (rank + 1) * length)).nonzero().squeeze(1)
    part = {name: getattr(routing, name)[chosen] for name in ("expert", "weight", "kept")}
    position = routing.position[chosen]
    return dataclasses.replace(
        routing,
        token=routing.token[chosen] - rank * length,
        position=requeued(part["expert"], position >= 0, part["kept"], position, routing.num_experts),
        num_tokens=length,
        **part,
    )


def joined(routings: Sequence[Routing]) -> Routing:
    """One routing of several, whose tokens stand behind each other: what processes recorded of one step.

    Each process had experts' queues of its own; the queues of the whole stand behind each other. Losses, statistics and
    deviations are means over the processes.

    Raises:
        UserError: they differ in experts or choices.
    """
    first = routings[0]
    if any((r.num_experts, r.choices) != (first.num_experts, first.choices) for r in routings):
        told = [(r.num_experts, r.choices) for r in routings]
        raise UserError(f"routings to be joined must agree on experts and choices: got {told}.")
    starts = torch.tensor([0, *(r.num_tokens for r in routings)]).cumsum(0).tolist()
    token = torch.cat([r.token + start for r, start in zip(routings, starts, strict=False)])
    order = torch.arange(token.numel())
    if first.choices is not None:  # choice-major again: all first choices, then all second
        choice = torch.cat([torch.arange(first.choices).repeat_interleave(r.num_tokens) for r in routings])
        order = torch.argsort(choice, stable=True)
    whole = {n: torch.cat([getattr(r, n) for r in routings])[order] for n in ("expert", "weight", "kept", "position")}
    most = 1 + max((int(r.position.max()) for r in routings if r.position.numel()), default=0)
    rank = torch.cat([torch.full_like(r.token, number) for number, r in enumerate(routings)])[order]
    behind = torch.where(whole["position"] >= 0, whole["position"] + most * rank, -1)
    position = requeued(whole["expert"], behind >= 0, whole["kept"], behind, first.num_experts)
    limits = [r.capacity for r in routings]
    return Routing(
        token=token[order],
        expert=whole["expert"],
        weight=whole["weight"],
        position=position,
        kept=whole["kept"],
        losses=_means([r.losses for r in routings]),
        statistics=_means([r.statistics for r in routings]),
        num_tokens=starts[-1],
        num_experts=first.num_experts,
        capacity=None if None in limits else sum(limit or 0 for limit in limits),
        choices=first.choices,
        all_kept=all(r.all_kept for r in routings),
    )


def _means(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([one[name] for one in found]).mean() for name in found[0] if all(name in f for f in found)
    }
