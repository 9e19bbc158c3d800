"""Places in the experts' queues: who is served before whom."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moekit.functional.few import is_few

# Up to so many experts, counting along a one-hot [E, N] beats a stable sort (two to four times at 8 experts, for 2,000
# to 16,000 assignments on a CPU); beyond 64 its memory traffic makes it many times slower.
_COUNT_UP_TO = 32


def service_order(
    probs: Tensor,
    priority: Literal["position", "probability", "random"],
    *,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Order in which the assignments of K choices are served; None where it is simply the order of the list.

    All first choices come before all second choices, and so on; the priority orders the tokens inside a choice.

    Args:
        probs: Float[K, T], probability of each choice of each token, row 0 the first choice. Padding may hold any
            value: a token that is not queued takes no place.
        priority: "position" (token order), "probability" (tokens by their highest probability, descending; ties in
            token order) or "random" (uniform, drawn for each choice afresh).
        generator: source of randomness for "random".

    Returns:
        Int64[K * T], a permutation of the choice-major list, or None for "position".

    Source: arXiv:2006.16668 Algorithm 1 (position); arXiv:2106.05974 section 4.1 (probability, BPR);
        arXiv:2109.10465 (random token selection).
    """
    k, t = probs.shape
    if priority == "position":
        return None
    if priority == "probability":
        tokens = torch.argsort(probs.detach().amax(0), descending=True, stable=True)
        order = tokens.expand(k, t)
    else:
        # Not in torch's default type: where that is bf16, draws have 256 values, and ties prefer the early tokens.
        draws = torch.rand(k, t, dtype=torch.float32, device=probs.device, generator=generator)
        order = draws.argsort(dim=1)
    return (order + torch.arange(k, device=probs.device)[:, None] * t).reshape(-1)


def queue_positions(expert: Tensor, queued: Tensor, num_experts: int, order: Tensor | None = None) -> Tensor:
    """Place of every assignment in its expert's queue: 0 for the first served, without gaps.

    Args:
        expert: Int64[N].
        queued: Bool[N], False = asks for no place.
        num_experts: E.
        order: Int64[N], a permutation: assignment ``order[0]`` is served first. None = list order.

    Returns:
        Int64[N]; -1 where not queued.
    """
    if is_few(expert):
        return _positions_on_host(expert, queued, num_experts, order)
    n = expert.numel()
    # Assignments that ask for nothing queue at a scratch expert behind the real ones, so no shape depends on data.
    slot = torch.where(queued, expert, num_experts)
    served = slot if order is None else slot[order]
    if num_experts <= _COUNT_UP_TO:
        here = torch.zeros(num_experts + 1, n, dtype=torch.int32, device=expert.device).scatter(0, served[None], 1)
        rank = here.cumsum(1, dtype=torch.int32).gather(0, served[None]).squeeze(0).to(torch.int64) - 1
        if order is not None:
            rank = torch.empty_like(rank).scatter(0, order, rank)
        return torch.where(queued, rank, -1)
    by_expert = torch.argsort(served, stable=True)
    grouped = served[by_expert]
    place = torch.arange(n, device=expert.device)
    # The queue of an expert begins where the sorted list changes: no table as long as there are experts.
    begins = torch.ones_like(queued)
    begins[1:] = grouped[1:] != grouped[:-1]
    rank = place - torch.where(begins, place, 0).cummax(0).values
    destination = by_expert if order is None else order[by_expert]
    position = torch.empty_like(slot).scatter(0, destination, rank)
    return torch.where(queued, position, -1)


def _positions_on_host(expert: Tensor, queued: Tensor, num_experts: int, order: Tensor | None) -> Tensor:
    """`queue_positions`, counted one by one."""
    experts, asks = expert.tolist(), queued.tolist()
    served = range(len(experts)) if order is None else order.tolist()
    taken, position = [0] * num_experts, [-1] * len(experts)
    for number in served:
        if asks[number]:
            at = experts[number]
            position[number] = taken[at]
            taken[at] += 1
    return torch.tensor(position, dtype=torch.int64, device=expert.device)
