"""Factors between our tensors and theirs, where the two multiply by something at different places."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.errors import UserError
from moekit.huggingface.architecture import NAMES, Architecture
from moekit.transformer.embedding import EmbeddingScale


@dataclass(frozen=True)
class Factors:
    """Theirs = ours times a factor.

    Attributes:
        queries: of the matrix (and bias) of queries, in attention over oneself and over the memory.
        embedding: of tables that embed tokens.
        output: of the table that makes logits.
    """

    queries: float
    embedding: float
    output: float


def factors(ours: Architecture, embedding_scale: EmbeddingScale, attention_scale: float | None) -> Factors:
    """What our tensors are multiplied by, so that theirs, used as theirs are, give the same results.

    Args:
        ours: our architecture.
        embedding_scale: how theirs scale embeddings.
        attention_scale: how theirs scale attention; None = 1 / sqrt(head_dim).

    Raises:
        UserError: if one table would have to be multiplied by two factors.
    """

    def scale(value: float | None) -> float:
        return ours.head_dim**-0.5 if value is None else value

    here, there = _ends(ours.embedding_scale, ours.dim), _ends(embedding_scale, ours.dim)
    embedding, output = (0.0 + a / b for a, b in zip(here, there, strict=True))
    if ours.tied and not math.isclose(embedding, output):
        raise UserError(
            f"transformers' {NAMES[ours.kind]} scales the one table of tied embeddings on the way in or on the way "
            f"out: this model does neither (embedding_scale={ours.embedding_scale!r})."
        )
    queries = 1.0 if ours.attention_scale == attention_scale else scale(ours.attention_scale) / scale(attention_scale)
    return Factors(queries, embedding, embedding if ours.tied else output)


def _ends(scale: EmbeddingScale, dim: int) -> tuple[float, float]:
    """What vectors are multiplied by on the way in, and hidden states on the way out."""
    return {"input": (dim**0.5, 1.0), "output": (1.0, dim**-0.5), "none": (1.0, 1.0)}[scale]
