"""What happens to choices that find their expert full. None = they are dropped and the residual carries the token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.functional.assignment import queue_positions
from moekit.routers.queueing import QueueResult, by_choice


@dataclass(frozen=True)
class NoTokenLeftBehind:
    """Send a dropped choice to the token's next best expert, and so on until it finds room (NTLB).

    A choice that overflowed tries, round by round, the experts that its token did not choose, from the most to the
    least probable; in a round, choices are served in the order of the first round, behind all that were placed before.
    The assignment then names the expert that took it, with that expert's probability. What finds no room in any round
    stays with its first expert and is dropped. With a capacity factor of 1 or more and all rounds nothing is left
    behind; a dropless router has no overflow, and nothing changes.

    Attributes:
        rounds: how often a choice is sent on; None = until its token has tried all experts.

    An early token's second try waits behind later tokens' first, so routes depend on later tokens: the router then
    looks ahead wherever it has a capacity.

    Raises:
        ValueError: if `rounds` is less than 1.

    Source: arXiv:2101.03961 appendix B, which finds no gain.
    Differs: the balance loss counts first tries (with ``Balance(when="after_drop")``: where choices ended); the
    authors' Mesh-TensorFlow code adds up the losses of four tries.
    """

    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(
                f"NoTokenLeftBehind.rounds must be at least 1, or None for as many as there are experts: got "
                f"{self.rounds}."
            )

    def __call__(
        self, expert: Tensor, requested: Tensor, probs: Tensor, queue: QueueResult
    ) -> tuple[Tensor, QueueResult]:
        """Place what overflowed.

        Args:
            expert: Int64[T, K], experts by choice.
            requested: Bool[T, K].
            probs: Float[T, E], without gradient.
            queue: what the first round gave, with a capacity.

        Returns:
            ``(expert, queue)`` after all rounds.
        """
        capacity = queue.capacity
        t, k = expert.shape
        num_experts = probs.shape[1]
        untried = num_experts - k
        if capacity is None or untried == 0 or t == 0:
            return expert, queue
        first, kept, place = by_choice(expert), by_choice(queue.kept), by_choice(queue.position)
        queued = by_choice(requested)
        # The experts that a token did not choose, best first; each try of the token takes the next one. No choice need
        # go back: an expert that was full stays full.
        others = probs.scatter(1, expert, -1.0).topk(untried, dim=-1).indices
        token = torch.arange(t, device=expert.device).repeat(k)
        taken, tries = first, torch.zeros(t, dtype=torch.int64, device=expert.device)
        load = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
        load = load.index_add(0, first, kept.to(torch.int64))
        for _ in range(untried if self.rounds is None else min(self.rounds, untried)):
            open_ = queued & ~kept
            # Which try of its token each choice makes: earlier choices of the token in this round come before it.
            turn = tries[token] + (open_.view(k, t).to(torch.int64).cumsum(0).view(-1) - 1)
            tries = tries + open_.view(k, t).sum(0)
            asks = open_ & (turn < untried)
            target = others[token, turn.clamp(0, untried - 1)]
            behind = queue_positions(target, asks, num_experts, queue.order) + load[target]
            fits = asks & (behind < capacity)
            taken, place = torch.where(fits, target, taken), torch.where(fits, behind, place)
            kept = kept | fits
            load = load.index_add(0, target, fits.to(torch.int64))
        # Who was sent on left the queue of its first expert: close the gaps behind the kept ones.
        lost = queued & ~kept
        behind = queue_positions(first, lost, num_experts, queue.order) + capacity
        place = torch.where(lost, behind, place)
        return taken.view(k, t).t(), QueueResult(place.view(k, t).t(), kept.view(k, t).t(), capacity, queue.order)
