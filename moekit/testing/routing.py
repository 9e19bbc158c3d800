"""The rules that every `Routing` obeys, whoever made it."""

from __future__ import annotations

import torch

from moekit.routing import Routing, RoutingContext
from moekit.testing.closeness import rule


def check_routing(routing: Routing, context: RoutingContext | None = None, *, what: str = "the routing") -> None:
    """Assert the rules that every `Routing` obeys, whoever made it.

    Raises:
        AssertionError: naming the rule that is broken.
    """
    n = routing.token.numel()
    for name in ("token", "expert", "weight", "position", "kept"):
        shape = getattr(routing, name).shape
        rule(shape == (n,), f"{what}: {name} has shape {tuple(shape)} and token has {n} entries.")
    for name in ("token", "expert", "position"):
        dtype = getattr(routing, name).dtype
        rule(dtype == torch.int64, f"{what}: {name} must be int64, not {dtype}.")
    rule(routing.kept.dtype == torch.bool, f"{what}: kept must be bool, not {routing.kept.dtype}.")
    rule(
        routing.weight.dtype in (torch.float32, torch.float64),
        f"{what}: weights must be at least float32, not {routing.weight.dtype}.",
    )
    for name, end in (("token", routing.num_tokens), ("expert", routing.num_experts)):
        ids = getattr(routing, name)
        rule(((ids >= 0) & (ids < end)).all(), f"{what}: {name} must be in 0..{end - 1}.")
    if routing.all_kept:
        rule(routing.kept.all(), f"{what}: all_kept says that all are kept, and {int((~routing.kept).sum())} are not.")
    if routing.choices is not None:
        in_turn = torch.arange(routing.num_tokens, device=routing.token.device).repeat(routing.choices)
        rule(
            torch.equal(routing.token, in_turn),
            f"{what}: choices={routing.choices} says that the list is choice-major: token must be 0..T-1 over again.",
        )
    weight = routing.weight.detach()[routing.kept]
    rule((weight.isfinite() & (weight >= 0)).all(), f"{what}: kept weights must be finite and not negative.")
    rule((routing.position >= -1).all(), f"{what}: positions start at 0; -1 means never queued.")
    rule(not (routing.kept & ~routing.queued).any(), f"{what}: an assignment is kept without a place in the queue.")
    _check_queues(routing, what)
    if context is not None and context.mask is not None:
        padded = routing.queued & ~context.mask[routing.token]
        rule(not padded.any(), f"{what}: {int(padded.sum())} assignments of padding are queued: mask them.")
    for kind in ("losses", "statistics"):
        for name, value in getattr(routing, kind).items():
            rule(value.shape == (), f"{what}: {kind} {name!r} must be a scalar, not of shape {tuple(value.shape)}.")
            rule(value.dtype in (torch.float32, torch.float64), f"{what}: {kind} {name!r} is {value.dtype}.")
            rule(value.isfinite(), f"{what}: {kind} {name!r} is {value.item()}.")
    for name, value in routing.statistics.items():
        rule(not value.requires_grad, f"{what}: statistic {name!r} carries a gradient: detach it.")


def _check_queues(routing: Routing, what: str) -> None:
    for kind, chosen in (("queued", routing.queued), ("kept", routing.kept)):
        for e in range(routing.num_experts):
            places = routing.position[chosen & (routing.expert == e)].sort().values
            rule(
                torch.equal(places, torch.arange(places.numel())),
                f"{what}: the places of {kind} assignments of expert {e} must be 0..n-1, each once; got "
                f"{places.tolist()}.",
            )
    if routing.capacity is None:
        rule(torch.equal(routing.kept, routing.queued), f"{what}: a routing without capacity must keep all it queues.")
        return
    kept = torch.bincount(routing.expert[routing.kept], minlength=routing.num_experts)
    most = int(kept.max()) if kept.numel() else 0
    rule(most <= routing.capacity, f"{what}: an expert keeps {most} assignments, capacity is {routing.capacity}.")
