"""`TopKRouter` where it is plain, by kernels: the same list, losses and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.kernels.gpu.router import MOST_EXPERTS, topk
from moekit.routers.sequence_capacity import SequenceCapacity
from moekit.routing import Capacity, Routing


def is_in_order(capacity: Capacity | SequenceCapacity, num_experts: int, *, training: bool) -> bool:
    """Whether experts serve the whole batch in the order of the list, and are few enough for the kernels."""
    if not isinstance(capacity, Capacity) or num_experts > MOST_EXPERTS:
        return False
    limited = (capacity.train if training else capacity.eval) is not None
    by_place = capacity.priority == "position" or (capacity.priority == "random" and not training)
    return not limited or (by_place and capacity.group_size is None)


def fused_routing(
    logits: Tensor,
    mask: Tensor | None,
    k: int,
    capacity: Capacity,
    renormalise: str,
    *,
    count_all: bool,
    training: bool,
) -> Routing:
    """The routing of a `TopKRouter` that sends all its choices and serves them in order.

    Of equally probable experts the one with the lowest number is chosen.

    Args:
        logits: Float32[T, E].
        mask: Bool[T], real tokens.
        k: choices per token.
        capacity: slots per expert.
        renormalise: the router's argument of that name.
        count_all: whether the balance loss counts all choices, or the first alone.
        training: the phase.
    """
    t, num_experts = logits.shape
    found = topk(logits, k, mask)
    slots = capacity.slots(t, num_experts, k, training=training)
    kept = found.position >= 0
    if slots is not None:
        kept = kept & (found.position < slots)
    weight = found.weight
    if renormalise == "after_drop":
        weight = weight * kept
    if renormalise != "none":
        weight = weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
    counts = (found.counts if count_all else found.counts[:1]).sum(0).to(weight.dtype)
    share = counts / counts.sum().clamp_min(1)
    return Routing(
        token=torch.arange(t, device=logits.device).repeat(k),
        expert=found.expert.reshape(-1),
        weight=weight.reshape(-1),
        position=found.position.reshape(-1),
        kept=kept.reshape(-1),
        losses={"load_balance": num_experts * (share * found.mean_probs).sum(), "router_z": found.router_z},
        statistics={"entropy": found.entropy, "logsumexp": found.logsumexp},
        num_tokens=t,
        num_experts=num_experts,
        capacity=slots,
        choices=k,
        all_kept=mask is None and slots is None,
    )
