"""A capacity that counts each sequence apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekit.routers.queueing import QueueResult, queue_apart


@dataclass(frozen=True)
class SequenceCapacity:
    """An expert takes the first `limit` tokens of every sequence that choose it, in training and in evaluation.

    For `TopKRouter` and what derives from it; other routers refuse it.

    The group in which tokens compete is one sequence, so a sequence gets the same result whatever it is batched with.
    A step of cached decoding sees one token of each sequence and drops nothing, where one pass over the whole target
    may: the two agree up to the first drop.

    Args:
        limit: tokens of a sequence per expert; first choices come before second ones.

    Raises:
        ValueError: if `limit` is less than 1.

    Source: arXiv:2006.16668 section 2.2 (groups that are served apart); a fixed number per sequence is how Hugging
        Face's SwitchTransformers (arXiv:2101.03961) drops tokens. Differs: padding takes no place.
    """

    limit: int

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"SequenceCapacity.limit must be at least 1: got {self.limit}.")

    @property
    def looks_ahead(self) -> bool:
        """Never: places are given in token order."""
        return False

    def slots(self, num_tokens: int, num_experts: int, k: int, *, training: bool) -> int | None:
        """None: there is no one number of slots for the whole batch, and rows are packed."""
        return None

    def enqueue(self, expert: Tensor, requested: Tensor, sequence: Tensor | None, num_experts: int) -> QueueResult:
        """Queue every choice that is ``requested`` Bool[T, K] by the ``sequence`` Int64[T] of its token.

        Raises:
            ValueError: if `sequence` is None.
        """
        if sequence is None:
            raise ValueError(
                "SequenceCapacity needs to know which sequence a token belongs to: RoutingContext.sequence is None. "
                "Transformers of moekit set it."
            )
        # There are at most as many sequences as tokens; how many, only the device knows.
        return queue_apart(expert, requested, num_experts, sequence, len(sequence), self.limit)
