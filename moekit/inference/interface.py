"""What a model must offer to be decoded, what a search is told, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moekit.data.tokenizer import SpecialTokens
from moekit.errors import UserError
from moekit.inference.batching import to_device
from moekit.routing import register_pytree


class Cache(Protocol):
    """Keys and values of earlier tokens, changed in place by `decode`."""

    def reorder(self, rows: Tensor) -> None:
        """Keep rows `rows` Int64[R'], each possibly several times, in that order."""

    def select_memory(self, sentences: Tensor) -> None:
        """Keep what belongs to the encoder memory of `sentences` Int64[B'] (nothing to do without an encoder)."""


class _Decoded(Protocol):
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits Float[..., V]."""

    def new_cache(self) -> Cache:
        """An empty cache."""


class CausalModel(_Decoded, Protocol):
    """A language model; `moekit.transformer.DecoderOnly` is one. What `decode` returns has a `hidden`."""

    def decode(self, ids: Tensor, mask: Tensor | None, language: Tensor | None, cache: Any | None) -> Any:
        """Hidden states Float[R, T, D] of tokens Int64[R, T]; with a cache, of the tokens it has not seen."""


class SequenceModel(_Decoded, Protocol):
    """A sequence-to-sequence model; `moekit.transformer.EncoderDecoder` is one."""

    def encode(self, source_ids: Tensor, source_mask: Tensor | None, language: Tensor | None) -> Any:
        """The memory of a source; what it returns has a `hidden` Float[B, S, D]."""

    def decode(
        self,
        target_ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        target_mask: Tensor | None,
        language: Tensor | None,
        cache: Any | None,
    ) -> Any:
        """As in `CausalModel`. There may be k rows per memory, side by side."""


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens written for a source of S tokens, the end token included: constant + ratio * S, at least 1.

    Raises:
        ValueError: if a number is negative or not finite, or both are 0.
    """

    constant: int = 20
    ratio: float = 1.5

    def __post_init__(self) -> None:
        if self.constant < 0 or not 0 <= self.ratio < math.inf or self.constant + self.ratio == 0:
            raise ValueError(
                "LengthLimit needs a constant and a finite ratio, at least 0 and not both 0: got "
                f"{self.constant} and {self.ratio}."
            )

    def __call__(self, source_length: Tensor) -> Tensor:
        """Limits Int64[B] for lengths Int64[B]."""
        return (self.constant + (self.ratio * source_length.double()).floor()).to(torch.int64).clamp_min(1)


@dataclass(frozen=True)
class Start:
    """Where a search begins.

    Attributes:
        prefix: Int64[B, P], begin token and given tokens, padded on the right.
        length: Int64[B], how much of `prefix` is given, at least 1.
        limit: Int64[B], the most tokens to write after it.
        tokens: special ids.
        suppress: ids never chosen; their probability is not given to others in scores.
        numbers: Int64[B], of the sentences in an input that is written in several batches, by which tokens are drawn;
            None = their places in this one.
    """

    prefix: Tensor
    length: Tensor
    limit: Tensor
    tokens: SpecialTokens = field(default_factory=SpecialTokens)
    suppress: Sequence[int] = ()
    numbers: Tensor | None = None

    def bounds(self) -> Bounds:
        """What a search has to know on the host before it begins."""
        found = (self.length.min(), self.length.max(), self.limit.max(), (self.length + self.limit).max())
        return Bounds(*torch.stack(found).tolist())  # host read: once for a search

    def suppressed(self) -> Tensor:
        """Int64: ids never chosen, padding among them.

        Raises:
            ValueError: if one is negative, which torch would count from the end of the vocabulary.
        """
        if min(self.suppress, default=0) < 0:
            raise ValueError(f"suppress must be ids of tokens, which begin at 0: got {min(self.suppress)}.")
        return to_device(sorted({self.tokens.pad, *self.suppress}), self.prefix.device)


class Bounds(NamedTuple):
    """Places of a `Start`."""

    shortest: int  # of what is given; up to here all texts are read at once
    longest: int  # of what is given; from here on all tokens are chosen
    most: int  # the largest limit
    end: int  # where the last text is cut


@dataclass(frozen=True)
class Generation:
    """N texts for each of B sentences.

    Attributes:
        ids: Int64[B, N, T], the end token included where the text ended, then padding; no begin token, no prompt.
        lengths: Int64[B, N], tokens of each text; 0 where there are fewer than N texts.
        scores: Float[B, N], what texts are ranked by; -inf where there are fewer than N.
        token_scores: Float[B, N, T], the model's log-probability of each token, 0 for given ones and padding.
        ended: Bool[B, N], whether the text ended by itself; else it was cut at the limit.
    """

    ids: Tensor
    lengths: Tensor
    scores: Tensor
    token_scores: Tensor
    ended: Tensor

    def lists(self) -> list[list[list[int]]]:
        """The texts as lists: ``[sentence][rank]``, only those that exist."""
        rows, lengths = self.ids.tolist(), self.lengths.tolist()  # host read: the texts
        return [
            [ids[:n] for ids, n in zip(texts, counts, strict=True) if n]
            for texts, counts in zip(rows, lengths, strict=True)
        ]

    def hypotheses(self, decode: Callable[[list[int]], str]) -> list[list[Hypothesis]]:
        """The texts with their scores, best first: ``[sentence][rank]``; a sentence has at least an empty one."""
        scores = self.scores.tolist()  # host read: with the texts
        return [
            [Hypothesis(decode(ids), score) for ids, score in zip(texts, row, strict=False)] or [Hypothesis("", 0.0)]
            for texts, row in zip(self.lists(), scores, strict=True)
        ]

    def best(self) -> list[list[int]]:
        """The first text of each sentence."""
        return [texts[0] if texts else [] for texts in self.lists()]


register_pytree(Generation)


@dataclass(frozen=True)
class Hypothesis:
    """One of the texts that a search found for a sentence.

    Attributes:
        text: the text.
        score: what it was ranked by (`Generation.scores`).
    """

    text: str
    score: float


def longest_text(lengths: Tensor, broken: Tensor) -> int:
    """The longest of `lengths`, for the end of a search.

    Args:
        lengths: Int64, of the texts.
        broken: Bool, for texts or sentences: which have no score that is a number.

    Raises:
        UserError: if something is broken: what was written means nothing then.
    """
    longest, wrong = torch.stack((lengths.max(), broken.sum())).tolist()  # host read: once for a search
    if wrong:
        raise UserError(
            f"a model must give numbers by which texts can be compared: it gave none for {wrong} of {broken.numel()}. "
            "Its weights may be NaN, or all of its tokens suppressed."
        )
    return int(longest)


class Search(Protocol):
    """A way to choose tokens: `Greedy`, `BeamSearch`, `Sampling`, or yours."""

    def run(self, session: Any, start: Start) -> Generation:
        """Write texts, asking the `Session` for the logits of the next tokens."""
