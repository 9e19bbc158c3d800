"""Denoising auto-encoding: text with infilled spans and dropped words to the clean text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from moekit.data.batch import Batch, Sentences, pair_batch
from moekit.data.keyed import Keys
from moekit.data.noising import SpanLength, drop_words, infill_spans
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer
from moekit.tasks.sequence import SequenceHead
from moekit.tasks.task import Lengths, SampleWording, Task


@dataclass(frozen=True)
class Denoising:
    """How a sentence is damaged for the denoising task: words are dropped, then spans filled in.

    Attributes:
        span_ratio: share of tokens in spans.
        mean_span: mean length of a span.
        span_length: distribution of lengths.
        marker: every span becomes the mask, or sentinel k becomes span k's.
        word_drop: chance of a word to vanish without trace.

    Source: arXiv:1910.13461 (30 % in spans, mean 3); the drop rate is arXiv:1711.00043's.
    """

    span_ratio: float = 0.3
    mean_span: float = 3.0
    span_length: SpanLength = "poisson"
    marker: Literal["mask", "sentinels"] = "mask"
    word_drop: float = 0.1

    def apply(self, text: Ragged, keys: Keys, tokenizer: Tokenizer) -> Ragged:
        """Damaged copies of `text`."""
        if self.word_drop:
            protected = text.tokens < tokenizer.first_text_id
            text = drop_words(text, keys, ratio=self.word_drop, starts_word=tokenizer.starts_word, protected=protected)
        if not self.span_ratio:
            return text
        return infill_spans(
            text,
            keys,
            ratio=self.span_ratio,
            mean_length=self.mean_span,
            markers=(tokenizer.mask_id,) if self.marker == "mask" else tokenizer.sentinel_ids,
            span_length=self.span_length,
            protected=text.tokens < tokenizer.first_text_id,
        )


class DenoisingHead(SequenceHead):
    """Denoising auto-encoding: text with infilled spans and dropped words to the clean text.

    Source: arXiv:2109.10465; span infilling as in arXiv:1910.13461 section 2.2.
    """

    task: ClassVar[str] = "denoising"


@dataclass(frozen=True)
class DenoisingTask(Task):
    """Damaged sentence with its own tag -> the clean sentence.

    Attributes:
        denoising: how sentences are damaged.
    """

    name: ClassVar[str] = DenoisingHead.task
    title: ClassVar[str] = "Denoising"
    explanation: ClassVar[str] = "Restore a sentence from which words were cut or dropped."
    samples: ClassVar[SampleWording] = SampleWording(
        "Samples of restored text",
        "Held-out texts the model never saw, damaged and restored. Marked words stand in the original too, in the "
        "same order; an unmarked word may still fit the gap.",
        "Damaged",
        "Original",
    )
    head = DenoisingHead
    writes = "text"
    recalls = "restored"

    denoising: Denoising = field(default_factory=Denoising)

    def sizes(self, lengths: Lengths) -> Sequence[Lengths]:
        """The damaged side is shorter than the clean text by a random amount; it is counted as if it were not."""
        return [lengths[0], lengths[0]]

    def collate(self, rows: Sentences) -> Batch:
        """``<2xx> damaged eos`` and ``bos clean eos``: translation from a damaged sentence to itself."""
        damaged = self.denoising.apply(rows.texts[0], rows.keys, rows.tokenizer)
        # How long the other ranks' damaged sentences are is not known here: this side is as wide as it must be.
        width = rows.width(damaged.lengths), rows.width(rows.lengths[0])
        return pair_batch(self.name, rows, damaged, rows.texts[0], width, cut=rows.goes_on(0))
