"""Span corruption as in T5: how many tokens go, in how many spans, is a function of the length; which, is random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moekit.data.batch import Batch, Sentences, pair_batch
from moekit.data.keyed import Keys
from moekit.data.noising import check_spans, choose, everywhere, first_spans, mark_spans
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.tasks.sequence import SequenceHead
from moekit.tasks.task import Lengths, SampleWording, Task

# Numbers of the independent streams of draws that a key gives.
_NOISE, _CLEAN = 16, 17


class Counts(NamedTuple):
    """What goes of sentences.

    Attributes:
        noise: Int64[B], tokens that are cut out.
        spans: Int64[B], in so many spans.
    """

    noise: Lengths
    spans: Lengths


def span_counts(lengths: Lengths, ratio: float, mean_length: float, most: Lengths | int | None = None) -> Counts:
    """How many tokens are cut out of sentences of these lengths, and in how many spans.

    noise = round(ratio * length), at least 1 and at most length - 1; spans = round(noise / mean_length), at least 1.
    Halves go to the even number. So a span has the mean length where noise is a multiple of it, and short sentences
    have less: up to 9 tokens lose one, up to 16 two, and up to 23 three, all in one span (15 %, mean 3).

    Args:
        lengths: Int64[B]. A sentence of one token loses nothing.
        ratio: share of tokens; 0 = none.
        mean_length: mean length of a span.
        most: spans that a sentence may have; None = any number.

    Source: arXiv:1910.10683 section 3.1.4, and ``random_spans_noise_mask`` of the authors' code.
    """
    longer = np.maximum(lengths, 2)
    noise = np.clip(np.round(longer * ratio), 1, longer - 1).astype(np.int64)
    noise = np.where((lengths > 1) & (ratio > 0), noise, 0)
    spans = np.maximum(np.round(noise / mean_length).astype(np.int64), 1)
    spans = np.minimum(spans, longer - noise)
    spans = spans if most is None else np.minimum(spans, most)
    return Counts(noise, np.where(noise > 0, spans, 0))


def noise_mask(lengths: Lengths, keys: Keys, counts: Counts) -> NDArray[np.bool_]:
    """Bool[sum(lengths)]: tokens in spans.

    Noise and the tokens that stay are each cut at random into as many parts as there are spans, every way alike, and
    the parts take turns, the tokens that stay first: a sentence begins with one of them and ends with a span.

    Args:
        lengths: Int64[B].
        keys: UInt64[B].
        counts: what goes of sentences of these lengths.

    Source: ``random_spans_noise_mask`` of the authors' code of arXiv:1910.10683.
    """
    parts = np.maximum(counts.spans, (lengths > 0).astype(np.int64))  # without noise: one part that stays
    clean = _segments(lengths - counts.noise, parts, keys, _CLEAN)
    noise = np.zeros_like(clean)
    noise[np.repeat(counts.spans > 0, parts)] = _segments(counts.noise, counts.spans, keys, _NOISE)
    turns = np.stack([clean, noise], axis=1).reshape(-1)
    return np.repeat(np.tile(np.array([False, True]), len(clean)), turns)


def _segments(items: Lengths, parts: Lengths, keys: Keys, stream: int) -> Lengths:
    """Int64[sum(parts)]: sizes of the parts of each row, at least 1 each, every way to cut it alike."""
    cuts = choose(np.maximum(items - 1, 0), np.maximum(parts - 1, 0), keys, stream)
    begins = np.ones(int(items.sum()), dtype=bool)
    first = np.zeros_like(begins)
    first[(np.cumsum(items) - items)[items > 0]] = True
    begins[~first] = cuts
    edges = np.flatnonzero(np.append(begins, True))
    return np.diff(edges)


def corrupt_spans(
    text: Ragged,
    keys: Keys,
    *,
    ratio: float = 0.15,
    mean_length: float = 3.0,
    markers: Sequence[int],
    protected: NDArray[np.bool_] | None = None,
) -> tuple[Ragged, Ragged]:
    """Replace random spans by a marker each, and return what was cut out.

    Args:
        text: the sentences.
        keys: UInt64[B].
        ratio: share of tokens that are cut out; see `span_counts`.
        mean_length: mean length of a span.
        markers: two or more ids: span k of a sentence gets marker k on both sides, and no sentence has more spans.
        protected: Bool[N] of tokens that stay; a span that meets one is two, of which those behind the last marker
            stay.

    Returns:
        The damaged sentences, and for each its spans, every one behind its marker.

    Raises:
        ValueError: if there are fewer than two markers, or no such spans.

    Source: arXiv:1910.10683 section 3.1.4 (15 %, mean 3). Differs: no marker closes the target, as in the authors' code
        and unlike figure 2: the end of the sentence does.
    """
    check_spans(ratio, mean_length)
    if len(markers) < 2:
        raise ValueError(f"corrupt_spans needs two or more markers, to tell spans apart: got {len(markers)}.")
    free = text if protected is None else text.keep(~protected)
    counts = span_counts(free.lengths, ratio, mean_length, len(markers))
    in_span = everywhere(noise_mask(free.lengths, keys, counts), protected)
    in_span = first_spans(text, in_span, len(markers))  # tokens that stay may have cut spans in two
    marked = mark_spans(text, in_span, markers)
    # Every span's first token twice: once as its marker.
    copies = in_span.astype(np.int64) + marked.begins
    tokens = np.repeat(text.tokens, copies)
    tokens[(np.cumsum(copies) - copies)[marked.begins]] = marked.markers
    lengths = np.bincount(text.row, weights=copies, minlength=len(text)).astype(np.int64)
    return marked.damaged, Ragged(tokens, lengths)


@dataclass(frozen=True)
class SpanCorruption:
    """How spans are cut out of a text for the span-corruption task of T5.

    Attributes:
        ratio: share of tokens in spans.
        mean_span: mean length of a span.
        packed: sentences of one language, in their order, are laid end to end and cut into chunks, whatever sentences
            they begin and end in. A chunk is as long as leaves a damaged text of `max_length` positions. False = every
            sentence by itself, which must have some 20 tokens for a span of 3.

    Source: arXiv:1910.10683 section 3.1.4 (15 %, mean 3) and 3.2.1 (packing; 512 positions); chunks as in
        ``random_spans_helper`` of the authors' code. Differs: there documents are shuffled before they are packed, and
        a span may reach from one into the next here as there.
    """

    ratio: float = 0.15
    mean_span: float = 3.0
    packed: bool = False

    def __post_init__(self) -> None:
        check_spans(self.ratio, self.mean_span)

    def lengths(self, clean: Lengths) -> tuple[Lengths, Lengths]:
        """Tokens of the damaged text, and of the spans with their markers, by those of the clean text."""
        noise, spans = span_counts(clean, self.ratio, self.mean_span, len(Tokenizer.sentinel_ids))
        return clean - noise + spans, noise + spans

    def chunk(self, tokens: int) -> int:
        """The most tokens that leave a damaged text of at most `tokens`."""
        candidates = np.arange(tokens, 2 * tokens + 2)
        return int(candidates[self.lengths(candidates)[0] <= tokens].max(initial=tokens))

    def check(self, tokens: int) -> None:
        """Raise UserError if texts that leave up to `tokens` tokens want more spans than there are sentinels."""
        longest = self.chunk(tokens) if self.packed else tokens
        wanted = int(span_counts(np.array([longest]), self.ratio, self.mean_span).spans[0])
        there = len(Tokenizer.sentinel_ids)
        if wanted > there:
            raise UserError(
                f"Span corruption needs a sentinel for each span: a text of {longest} tokens has {wanted} spans, the "
                f"vocabulary {there} sentinels. Lower data.max_length or the share of tokens in spans, or raise the "
                "mean length of a span."
            )

    def apply(self, text: Ragged, keys: Keys, tokenizer: Tokenizer) -> tuple[Ragged, Ragged]:
        """Damaged copies of `text`, and the spans that are missing."""
        return corrupt_spans(
            text,
            keys,
            ratio=self.ratio,
            mean_length=self.mean_span,
            markers=tokenizer.sentinel_ids,
            protected=text.tokens < tokenizer.first_text_id,
        )


class SpanCorruptionHead(SequenceHead):
    """T5's objective: text with spans cut out to the missing spans, each behind its sentinel.

    Source: arXiv:1910.10683 section 3.1.4; used by arXiv:2101.03961 and arXiv:2202.08906.
    """

    task: ClassVar[str] = "span_corruption"


@dataclass(frozen=True)
class SpanCorruptionTask(Task):
    """Text with spans cut out -> the missing spans.

    Attributes:
        span_corruption: how spans are cut out.
    """

    name: ClassVar[str] = SpanCorruptionHead.task
    title: ClassVar[str] = "Span corruption"
    explanation: ClassVar[str] = "Write the spans that were cut out of a text, each behind the mark of its gap."
    samples: ClassVar[SampleWording] = SampleWording(
        "Samples of missing spans",
        "Held-out texts the model never saw, with spans cut out. Marked words stand in the missing spans too, in the "
        "same order; an unmarked word may still fit the gap.",
        "Damaged",
        "Missing spans",
    )
    head = SpanCorruptionHead
    writes = "spans"
    recalls = "span"

    span_corruption: SpanCorruption = field(default_factory=SpanCorruption)

    @classmethod
    def configured(cls, data: Any) -> dict[str, Any]:  # noqa: D102
        return {"span_corruption": SpanCorruption(data.span_ratio, data.mean_span, data.packed)}

    def check(self, room: int) -> None:  # noqa: D102
        self.span_corruption.check(room)

    def chunk(self, room: int) -> int | None:  # noqa: D102
        return self.span_corruption.chunk(room) if self.span_corruption.packed else None

    def sizes(self, lengths: Lengths) -> Sequence[Lengths]:  # noqa: D102
        return self.span_corruption.lengths(lengths[0])

    def collate(self, rows: Sentences) -> Batch:
        """``<2xx> damaged eos`` and ``bos spans eos``."""
        damaged, spans = self.span_corruption.apply(rows.texts[0], rows.keys, rows.tokenizer)
        return pair_batch(self.name, rows, damaged, spans, (rows.width(damaged.lengths), rows.width(spans.lengths)))
