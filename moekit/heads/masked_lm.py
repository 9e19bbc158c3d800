"""Masked language modelling on the encoder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from moekit.data.batch import Batch
from moekit.heads.base import Scores, TokenHead, name_routings, pick
from moekit.layer import AuxLosses


class MaskedLMTransform(nn.Module):
    """The small network between encoder and output projection: linear, GELU, norm.

    Args:
        dim: D.

    Source: arXiv:1810.04805, authors' code (GELU by tanh, norm with epsilon 1e-12); arXiv:2003.10555's generator has
        the same. Differs: the scores over the vocabulary, which are the backbone's, get no bias.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden: Tensor) -> Tensor:
        """Float[..., D] to Float[..., D]."""
        out: Tensor = self.norm(F.gelu(self.dense(hidden), approximate="tanh"))
        return out


class MaskedLMHead(TokenHead):
    """Predict the original of masked tokens from the encoder alone; the decoder idles.

    Args:
        dim: D of the backbone.
        backbone: see `Head`.
        aux: see `Head`.
        learning_rate: see `Head`.

    Source: arXiv:1810.04805 section 3.1; as one of the tasks of arXiv:2109.10465.
    """

    task: ClassVar[str] = "masked_lm"

    def __init__(
        self,
        dim: int,
        backbone: nn.Module | None = None,
        *,
        aux: AuxLosses | None = None,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(backbone, aux=aux, learning_rate=learning_rate)
        self.transform = MaskedLMTransform(dim)

    def score(self, batch: Batch, backbone: Any) -> Scores:  # noqa: D102
        if batch.labels is None:
            raise ValueError(f"a batch of task {batch.task!r} must have labels: got none.")
        encoded = backbone.encode(batch.source, batch.source_mask, language=batch.source_language)
        logits = backbone.logits(self.transform(pick(encoded.hidden, batch.predicted)))
        return Scores(logits, pick(batch.labels, batch.predicted), name_routings(backbone, encoded))
