"""The best next tokens of each row and their log-probabilities, in memory that is kept between steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 160  # tokens of which the best is found first,
_CHUNK_OF_ONE = 320  # and where only one is looked for
_FEWEST = 1024  # tokens up to which the plain form is as fast
_TOGETHER = 1 << 18  # logits that stay in a core's cache while they are read several times


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
        """The k best tokens of `logits` Float[R, V]; for k = 1 the first of equals. Afterwards they are as before."""
        rows, size = logits.shape
        if logits.device.type != "cpu" or size < _FEWEST or k > _CHUNK or not rows or not _may_be_written(logits):
            return ranked_reference(logits, k, self._left_out)
        logits = logits.contiguous()
        left_out = logits.index_select(1, self._left_out)
        logits.index_fill_(1, self._left_out, -torch.inf)
        values, tokens = _best(logits, k)
        logits.index_copy_(1, self._left_out, left_out)
        peak = torch.maximum(values[:, :1], left_out.amax(-1, keepdim=True))
        peak = peak.masked_fill(peak.isinf(), 0.0)
        partition = self._sums(logits, peak).log_() + peak
        return Ranked(values - partition, tokens, partition)

    def _sums(self, logits: Tensor, peak: Tensor) -> Tensor:
        """Float[R, 1]: the sum of exp(logits - peak) of each row, of few rows at a time."""
        rows, size = logits.shape
        together = max(_TOGETHER // size, 1)
        room = self._room
        if room is None or room.shape != (together, size) or room.dtype != logits.dtype or not _may_be_written(room):
            room = self._room = logits.new_empty(together, size)
        sums = torch.empty_like(peak)
        for start in range(0, rows, together):
            part = slice(start, start + together)
            shifted = torch.sub(logits[part], peak[part], out=room[: min(together, rows - start)])
            torch.sum(shifted.exp_(), -1, keepdim=True, out=sums[part])
        return sums


def _may_be_written(tensor: Tensor) -> bool:
    """Whether torch lets it be changed for a moment: a backward may want it, and inference mode keeps its own."""
    return not tensor.requires_grad and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def _best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `top` finds in rows that are long: the k best are in the k chunks of the largest maxima."""
    size = logits.shape[1]
    width = _CHUNK_OF_ONE if k == 1 else _CHUNK
    whole = size // width * width
    peaks = logits[:, :whole].unflatten(1, (-1, width)).amax(-1)
    if whole < size:
        peaks = torch.cat((peaks, logits[:, whole:].amax(-1, keepdim=True)), 1)
    chunk = top(peaks, min(k, peaks.shape[1]))[1]
    if k > 1:
        chunk = chunk.sort(-1).values  # in order, so that the first of equals is found first
    columns = (chunk[..., None] * width + torch.arange(width, device=chunk.device)).flatten(1)
    if whole < size:
        shown = logits.gather(1, columns.clamp_max(size - 1)).masked_fill_(columns >= size, -torch.inf)
        columns = columns.clamp_max_(size - 1)
    else:
        shown = logits.gather(1, columns)
    values, place = top(shown, k)
    return values, columns.gather(1, place)


def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first; for k = 1 the first of equals, as greedy search takes it."""
    if k == 1:
        best, index = values.max(-1, keepdim=True)
        return best, index
    best, index = values.topk(k, dim=-1)
    return best, index
