"""Sequence-to-sequence heads. They differ in data, not in arithmetic."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from moekit.data.batch import Batch
from moekit.heads.base import Scores, TokenHead, name_routings, pick
from moekit.layer import AuxLosses


class SequenceHead(TokenHead):
    """Encode the source, decode the target with teacher forcing, predict every real target token.

    Args:
        backbone: see `Head`.
        label_smoothing: epsilon of the cross-entropy (0.1 in arXiv:1706.03762 section 5.4).
        aux: see `Head`.
        learning_rate: see `Head`.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        label_smoothing: float = 0.1,
        aux: AuxLosses | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(backbone, label_smoothing=label_smoothing, aux=aux, learning_rate=learning_rate)

    def score(self, batch: Batch, backbone: Any) -> Scores:  # noqa: D102
        if batch.target is None or batch.target_mask is None:
            raise ValueError(f"a batch of task {batch.task!r} must have a target: got none.")
        encoded = backbone.encode(batch.source, batch.source_mask, language=batch.source_language)
        decoded = backbone.decode(
            batch.target[:, :-1],
            encoded.hidden,
            batch.source_mask,
            target_mask=batch.target_mask[:, 1:],
            language=batch.target_language,
        )
        # Only real tokens go through the output projection, the largest product of a small model.
        logits = backbone.logits(pick(decoded.hidden, batch.predicted))
        return Scores(logits, pick(batch.target[:, 1:], batch.predicted), name_routings(backbone, encoded, decoded))


class TranslationHead(SequenceHead):
    """Machine translation: source with a target-language tag to target, on parallel text.

    Source: arXiv:2109.10465; tags as in arXiv:1611.04558.
    """

    task: ClassVar[str] = "translation"


class DenoisingHead(SequenceHead):
    """Denoising auto-encoding: text with infilled spans and dropped words to the clean text.

    The noise is made where batches are made (`moekit.data.noising`).

    Source: arXiv:2109.10465; span infilling as in arXiv:1910.13461 section 2.2.
    """

    task: ClassVar[str] = "denoising"


class SpanCorruptionHead(SequenceHead):
    """T5's objective: text with spans cut out to the missing spans, each behind its sentinel.

    The spans are cut out where batches are made (`moekit.data.noising`).

    Source: arXiv:1910.10683 section 3.1.4; used by arXiv:2101.03961 and arXiv:2202.08906.
    """

    task: ClassVar[str] = "span_corruption"
