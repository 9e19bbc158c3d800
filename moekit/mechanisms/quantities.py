"""Quantities of single routings: pure functions of assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.assignment import queue_positions
from moekit.routing import Routing

ACTIVE_SHARE = 0.01
"""An expert is active if it gets at least this part of an even share, 1 / E of all assignments."""


def active_experts(load: Tensor) -> int:
    """How many experts get at least `ACTIVE_SHARE` of an even share; the others are dead.

    Args:
        load: Int[E], assignments that asked for each expert.
    """
    counts = load.to(torch.float64)
    return int((counts >= ACTIVE_SHARE * counts.sum() / counts.numel()).sum()) if bool(counts.sum() > 0) else 0


def effective_experts(load: Tensor) -> float:
    """Exp of the entropy of the load: E where it is even, 1 where one expert gets all; 0 without assignments.

    Args:
        load: Int[E].
    """
    counts = load.to(torch.float64)
    if not bool(counts.sum() > 0):
        return 0.0
    return float(torch.special.entr(counts / counts.sum()).sum().exp())


def drops_by_place(routing: Routing, place: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Assignments that asked for room, and those of them that were dropped, by the place of their tokens.

    Args:
        routing: of T tokens.
        place: Int64[T], the bin of each token, 0 to bins - 1.
        bins: number of bins.

    Returns:
        Int64[bins] each.
    """
    where = place[routing.token]
    asked = torch.zeros(bins, dtype=torch.int64).index_add_(0, where, routing.queued.to(torch.int64))
    lost = (routing.queued & ~routing.kept).to(torch.int64)
    return asked, torch.zeros(bins, dtype=torch.int64).index_add_(0, where, lost)


def coactivation(routing: Routing) -> Tensor:
    """Int64[E, E]: tokens that two experts have in common; on the diagonal those that an expert has.

    What asked for room counts, dropped or not.

    Source: OLMoE, arXiv:2409.02060 section 5.2 (there divided by the diagonal: the share of an expert's tokens).
    """
    member = _members(routing).to(torch.float64)
    return (member.t() @ member).round().to(torch.int64)


def saturation(routing: Routing, last: Routing) -> tuple[int, int]:
    """How many of the choices of the last step's router were made before: the same choices, and all of them.

    A token's choices are the experts that it asked for; the saturation is the first number over the second.

    Args:
        routing: of the same tokens at an earlier step.
        last: at the last step.

    Raises:
        ValueError: they are of other tokens or experts.

    Source: OLMoE, arXiv:2409.02060 section 5.1, router saturation.
    """
    if (routing.num_tokens, routing.num_experts) != (last.num_tokens, last.num_experts):
        raise ValueError(
            "saturation compares routings of the same tokens and experts: got "
            f"{routing.num_tokens} tokens and {routing.num_experts} experts, and {last.num_tokens} and "
            f"{last.num_experts}."
        )
    now, then = _members(last), _members(routing)
    return int((now & then).sum()), int(now.sum())


def _members(routing: Routing) -> Tensor:
    """Bool[T, E]: which experts a token asked for."""
    flat = torch.zeros(routing.num_tokens * routing.num_experts, dtype=torch.bool)
    flat[(routing.token * routing.num_experts + routing.expert)[routing.queued]] = True
    return flat.view(routing.num_tokens, routing.num_experts)


def places(mask: Tensor | None, num_tokens: int, bins: int) -> Tensor:
    """Int64[T]: the bin of each token by its place among the real tokens of the batch, in equal parts."""
    real = torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask
    rank = queue_positions(torch.zeros(num_tokens, dtype=torch.int64), real, 1).clamp_min(0)
    return rank * bins // real.sum().clamp_min(1)
