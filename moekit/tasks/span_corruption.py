"""Span corruption: T5's task, to write the spans that were cut out of a text, at random or for what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from moekit.data.batch import Batch, Sentences, pair_batch
from moekit.data.keyed import Keys
from moekit.data.noising import check_spans
from moekit.data.ragged import Ragged
from moekit.data.salient import SalientWords, WordPlaces
from moekit.data.spans import corrupt_salient, corrupt_spans, salient_lengths, span_counts
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.source import Source
from moekit.tasks.sequence import SequenceHead
from moekit.tasks.task import Lengths, SampleWording, Task


@dataclass(frozen=True)
class SpanCorruption:
    """How spans are cut out of a text for the span-corruption task of T5.

    Attributes:
        ratio: share of tokens in spans.
        mean_span: mean length of a span.
        packed: sentences of one language, in their order, are laid end to end and cut into chunks, whatever sentences
            they begin and end in. A chunk is as long as leaves a damaged text of `max_length` positions, with salient
            words one that has them before anything is cut out. False = every sentence by itself, which must have some
            20 tokens for a span of 3.
        salient: share of the salient words of a text that are cut out, each as a span of its own, and at least one; a
            text without any has random spans. 0 = random spans everywhere.

    Raises:
        ValueError: no such share of tokens or words, or no such length.

    Source: arXiv:1910.10683 section 3.1.4 (15 %, mean 3) and 3.2.1 (packing; 512 positions); chunks as in
        ``random_spans_helper`` of the authors' code. Differs: there documents are shuffled before they are packed, and
        a span may reach from one into the next here as there.
    """

    ratio: float = 0.15
    mean_span: float = 3.0
    packed: bool = False
    salient: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        check_spans(self.ratio, self.mean_span)
        if not 0 <= self.salient <= 1:
            raise ValueError(f"salient must be a share of the salient words from 0 to 1: got {self.salient}.")

    def lengths(self, clean: Lengths) -> tuple[Lengths, Lengths]:
        """Tokens of the damaged text, and of the spans with their markers, by those of the clean text.

        Of salient words, of which a text may have none or be full, the most that it can be.
        """
        if self.salient:
            return clean, clean + np.minimum(clean, len(Tokenizer.sentinel_ids))
        noise, spans = span_counts(clean, self.ratio, self.mean_span, len(Tokenizer.sentinel_ids))
        return clean - noise + spans, noise + spans

    def text_lengths(self, text: Ragged, found: WordPlaces) -> tuple[Lengths, Lengths]:
        """As `lengths`, of texts whose salient words are known; see `moekit.data.spans.salient_lengths`."""
        own = salient_lengths(found, self.salient, len(Tokenizer.sentinel_ids), text.lengths)
        others = replace(self, salient=0.0).lengths(text.lengths)
        damaged, spans = (np.where(found.number > 0, a, b) for a, b in zip(own, others, strict=True))
        return damaged, spans

    def chunk(self, tokens: int) -> int:
        """The most tokens that leave a damaged text of at most `tokens`."""
        if self.salient:
            return tokens
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

    def apply(
        self, text: Ragged, keys: Keys, tokenizer: Tokenizer, found: WordPlaces | None = None
    ) -> tuple[Ragged, Ragged]:
        """Damaged copies of `text`, and the spans that are missing.

        Args:
            text: B texts without special tokens.
            keys: UInt64[B].
            tokenizer: whose sentinels stand in the place of spans.
            found: their salient words; None = random spans.
        """
        options: dict[str, Any] = {
            "ratio": self.ratio,
            "mean_length": self.mean_span,
            "markers": tokenizer.sentinel_ids,
            "protected": text.tokens < tokenizer.first_text_id,
        }
        if found is None:
            return corrupt_spans(text, keys, **options)
        return corrupt_salient(text, keys, found, share=self.salient, **options)


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
        words: the salient words of the text, after `bound`.
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
    words: SalientWords | None = field(default=None, repr=False)

    @classmethod
    def of(cls, settings: Any) -> Self:  # noqa: D102
        return cls(settings.span_corruption)

    @classmethod
    def configured(cls, data: Any) -> dict[str, Any]:  # noqa: D102
        share = 0.0 if data.salient is None else data.salient_share
        return {"span_corruption": SpanCorruption(data.span_ratio, data.mean_span, data.packed, share)}

    @property
    def seeks_words(self) -> bool:  # noqa: D102
        return self.span_corruption.salient > 0

    def check(self, room: int, source: Source) -> None:
        """Raise UserError if texts want more spans than there are sentinels, or the source names no salient words."""
        self.span_corruption.check(room)
        if self.seeks_words and all(source.salient(language) is None for language in source.languages):
            raise UserError(
                f"data.salient source needs a corpus that names its salient words: got {source.name}, which has none. "
                "Give a file with one word a line, or leave data.salient out."
            )

    def bound(self, source: Source, tokenizer: Tokenizer) -> Self:  # noqa: D102
        if not self.seeks_words:
            return self
        words = {language: source.salient(language) or () for language in source.languages}
        return replace(self, words=SalientWords(words, tokenizer))

    def require_words(self, texts: Iterable[tuple[Ragged, Lengths]]) -> None:
        """Raise UserError if none of some training texts, with the ids of their languages, has a salient word."""
        looked_at = 0
        for text, languages in texts:
            if self._found(text, languages).number.any():
                return
            looked_at += len(text)
        raise UserError(
            f"span corruption of salient words needs texts that have some: of the {looked_at:,} texts looked at none "
            "has. Write the words of data.salient as the text has them, one a line, or leave data.salient out."
        )

    def chunk(self, room: int) -> int | None:  # noqa: D102
        return self.span_corruption.chunk(room) if self.span_corruption.packed else None

    def sizes(self, lengths: Lengths) -> Sequence[Lengths]:  # noqa: D102
        return self.span_corruption.lengths(lengths[0])

    def text_sizes(self, text: Ragged, languages: Lengths) -> Sequence[Lengths]:  # noqa: D102
        return self.span_corruption.text_lengths(text, self._found(text, languages))

    def asked(self, text: Ragged, languages: Lengths, tokenizer: Tokenizer) -> tuple[Ragged, Ragged] | None:  # noqa: D102
        if self.words is None or self.span_corruption.salient < 1:
            return None
        keys = np.zeros(len(text), dtype=np.uint64)  # all words go and no other, so that none is drawn
        return replace(self.span_corruption, ratio=0.0).apply(text, keys, tokenizer, self._found(text, languages))

    def collate(self, rows: Sentences) -> Batch:
        """``<2xx> damaged eos`` and ``bos spans eos``."""
        text = rows.texts[0]
        found = self._found(text, rows.languages[0]) if self.seeks_words else None
        damaged, spans = self.span_corruption.apply(text, rows.keys, rows.tokenizer, found)
        return pair_batch(self.name, rows, damaged, spans, (rows.width(damaged.lengths), rows.width(spans.lengths)))

    def _found(self, text: Ragged, languages: Lengths) -> WordPlaces:
        assert self.words is not None, "bound to a source before it reads text"
        return self.words.find(text, languages)
