"""Deal a batch's tokens to ranks at random before each rank solves its assignment problem, and bring answers back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankShuffle:
    """Every rank sends each of its tokens to a random rank, which chooses the token's expert and sends the choice back.

    A rank holds whole sequences, whose tokens are alike; to force balance among them would send many to experts that do
    not suit them. A problem made of tokens from everywhere is balanced more cheaply.

    What travels is a row of E scores, and back comes one number: all that the choice needs. Tokens themselves stay, and
    go straight to their experts afterwards.

    Args:
        group: process group; None = all processes. Without torch.distributed, or in a group of one, nothing travels.
            A strategy that spreads experts over ranks hands its group over.

    Copies share the group. Pickle refuses a given group, which means nothing in another process.

    Source: arXiv:2103.16716 (the shuffle before the assignment). Differs: the paper sends the tokens themselves to a
        random rank, from there to their experts, and both ways back: the same choices and results for two more
        all-to-alls of hidden states each way.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def num_ranks(self) -> int:
        """How many ranks deal with one another."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def assign(self, scores: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        """Choose experts for this rank's tokens in problems that mix all ranks' tokens. All ranks must call it.

        Args:
            scores: Float[n, E] of this rank's tokens; ranks may have different numbers, or none.
            solve: chooses: Float[m, E] -> Int64[m].

        Returns:
            Int64[n].
        """
        ranks = self.num_ranks
        if ranks == 1:
            return solve(scores)
        n, device = scores.shape[0], scores.device
        order = torch.randperm(n, device=device)
        # The remainder goes to the ranks behind this one, so that not all ranks burden the same ones.
        place = (torch.arange(ranks) - dist.get_rank(self.group)) % ranks
        sent = n // ranks + (place < n % ranks).to(torch.int64)
        got = torch.empty_like(sent, device=device)
        dist.all_to_all_single(got, sent.to(device), group=self.group)
        sizes_out, sizes_in = sent.tolist(), got.tolist()  # host read: the sizes of messages

        arrived = scores.new_empty(sum(sizes_in), scores.shape[1])
        dist.all_to_all_single(arrived, scores[order].contiguous(), sizes_in, sizes_out, group=self.group)
        answers = torch.empty(n, dtype=torch.int64, device=device)
        dist.all_to_all_single(answers, solve(arrived).contiguous(), sizes_out, sizes_in, group=self.group)
        return torch.empty_like(answers).scatter(0, order, answers)

    def __repr__(self) -> str:
        return f"RankShuffle({'' if self.group is None else 'group'})"

    def __deepcopy__(self, memo: dict[int, Any]) -> RankShuffle:
        return RankShuffle(self.group)

    def __reduce__(self) -> tuple[type[RankShuffle], tuple[()]]:
        if self.group is not None:
            raise TypeError(
                "RankShuffle with a process group cannot be pickled: a group means nothing in another process. Make it "
                "there, or leave the group out for all processes."
            )
        return (RankShuffle, ())
