"""Causal language modelling on a decoder."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from moekit.data.batch import Batch
from moekit.heads.base import Head, HeadOutput, name_routings, predict
from moekit.layer import AuxLosses


class CausalLMHead(Head):
    """Predict each token from those before it, with a decoder-only backbone.

    Args:
        backbone: see `Head`.
        label_smoothing: epsilon of the cross-entropy.
        aux: see `Head`.
        learning_rate: see `Head`.

    Source: arXiv:2112.10684 (sparse), arXiv:2005.14165 (dense).
    """

    task: ClassVar[str] = "causal_lm"

    def __init__(
        self,
        backbone: nn.Module | None = None,
        *,
        label_smoothing: float = 0.0,
        aux: AuxLosses | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(backbone, aux=aux, learning_rate=learning_rate)
        self.label_smoothing = label_smoothing

    def compute(self, batch: Batch, backbone: Any) -> HeadOutput:  # noqa: D102
        if batch.target is None or batch.target_mask is None:
            raise ValueError(f"a batch of task {batch.task!r} must have a target: got none.")
        decoded = backbone.decode(batch.target[:, :-1], batch.target_mask[:, 1:], language=batch.target_language)
        real = batch.target_mask[:, 1:]
        out = predict(backbone.logits(decoded.hidden[real]), batch.target[:, 1:][real], self.label_smoothing)
        routings = name_routings(backbone, decoded)
        return HeadOutput(out.loss, out.nll, out.correct, out.num_predictions, routings, {})
