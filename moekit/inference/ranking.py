"""The best next tokens of each row and their log-probabilities, in memory that is kept between steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 80  # tokens of which the best is found first: about the root of usual vocabularies
_FEWEST = 1024  # tokens up to which the plain form is as fast


class Ranked(NamedTuple):
    """The k best tokens of R rows.

    Attributes:
        values: Float[R, k], log-probabilities, highest first; -inf where there are fewer tokens than k.
        tokens: Int64[R, k].
        partition: Float[R, 1], what was subtracted from the logits: the logarithm of the sum of their exponentials.
    """

    values: Tensor
    tokens: Tensor
    partition: Tensor


def ranked_reference(logits: Tensor, k: int, left_out: Tensor) -> Ranked:
    """The obvious form of `Ranking`; see there."""
    partition = logits.logsumexp(-1, keepdim=True)
    values, tokens = top(logits.index_fill(-1, left_out, -torch.inf), k)
    return Ranked(values - partition, tokens, partition)


class Ranking:
    """Ranks the next tokens, step after step.

    On a CPU the best of a large vocabulary are looked for among the chunks that hold the largest maxima, which reads
    the logits a few times and sorts next to nothing; elsewhere torch's own kernels do it.

    Args:
        left_out: Int64, tokens that are not chosen; they keep their share of the probability.
    """

    def __init__(self, left_out: Tensor) -> None:
        self._left_out = left_out
        self._room: Tensor | None = None

    def __call__(self, logits: Tensor, k: int) -> Ranked:
        """The k best tokens of `logits` Float[R, V]; for k = 1 the first of equals. The logits are not changed."""
        rows, size = logits.shape
        if logits.device.type != "cpu" or size < _FEWEST or k > _CHUNK or not rows:
            return ranked_reference(logits, k, self._left_out)
        room = self._kept(logits)
        own = room[:, :size]
        own.copy_(logits)
        own.index_fill_(1, self._left_out, -torch.inf)
        chunks = room.view(rows, -1, _CHUNK)
        # The k best are in the k chunks of the largest maxima.
        chunk = top(chunks.amax(-1), min(k, chunks.shape[1]))[1].sort(-1).values  # in order: the first of equals
        shown = chunks.gather(1, chunk[..., None].expand(-1, -1, _CHUNK)).flatten(1)
        values, place = top(shown, k)
        tokens = (chunk.gather(1, place // _CHUNK) * _CHUNK + place % _CHUNK).clamp_max(size - 1)
        peak = torch.maximum(values[:, :1], logits.index_select(1, self._left_out).amax(-1, keepdim=True))
        peak = peak.masked_fill(peak.isinf(), 0.0)
        torch.sub(logits, peak, out=own)
        partition = own.exp_().sum(-1, keepdim=True).log_() + peak
        return Ranked(values - partition, tokens, partition)

    def _kept(self, logits: Tensor) -> Tensor:
        """Float[R, whole chunks], -inf behind the vocabulary; what it holds else is of the last step."""
        rows, size = logits.shape
        width = -(-size // _CHUNK) * _CHUNK
        room = self._room
        if room is None or room.shape[0] < rows or room.shape[1] != width or room.dtype != logits.dtype:
            room = logits.new_full((rows, width), -torch.inf)
            self._room = room
        return room[:rows]


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first; for k = 1 the first of equals, as greedy search takes it."""
    if k == 1:
        best, index = values.max(-1, keepdim=True)
        return best, index
    best, index = values.topk(k, dim=-1)
    return best, index
