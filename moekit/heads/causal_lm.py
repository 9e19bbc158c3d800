"""Causal language modelling on a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from moekit.data.batch import Batch
from moekit.heads.base import Scores, TokenHead, name_routings, pick


class CausalLMHead(TokenHead):
    """Predict each token from those before it, with a decoder-only backbone.

    Args:
        backbone: see `Head`.
        label_smoothing: epsilon of the cross-entropy.
        aux: see `Head`.
        learning_rate: see `Head`.

    Source: arXiv:2112.10684 (sparse), arXiv:2005.14165 (dense).
    """

    task: ClassVar[str] = "causal_lm"

    def score(self, batch: Batch, backbone: Any) -> Scores:  # noqa: D102
        if batch.target is None or batch.target_mask is None:
            raise ValueError(f"a batch of task {batch.task!r} must have a target: got none.")
        decoded = backbone.decode(batch.target[:, :-1], batch.target_mask[:, 1:], language=batch.target_language)
        logits = backbone.logits(pick(decoded.hidden, batch.predicted))
        return Scores(logits, pick(batch.target[:, 1:], batch.predicted), name_routings(backbone, decoded))
