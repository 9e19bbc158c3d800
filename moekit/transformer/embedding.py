"""Token embeddings, which are also the output projection where they are tied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.kernels.packed_matrix import PackedMatrix, can_pack
from moekit.kernels.vocabulary_loss import TokenLoss, logits_loss, vocabulary_loss

EmbeddingScale = Literal["input", "output", "none"]


class Vocabulary:
    """Looks tokens up in a table, and scores hidden states against it: here in a whole one, subclasses in a part."""

    def vectors(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Float[..., D] of ids Int64[...] by ``weight`` Float[V, D]."""
        return F.embedding(ids, weight)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Float[..., V] of ``hidden`` Float[..., D]."""
        return F.linear(hidden, weight)

    def cross_entropy(self, hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> TokenLoss:
        """Loss of the logits of ``hidden`` Float[N, D] where `labels` Int64[N] are right."""
        if type(self).logits is not Vocabulary.logits or isinstance(weight, DTensor):
            # A divided table has its own way to its logits, which are gathered.
            return logits_loss(self.logits(hidden, weight), labels, label_smoothing)
        return vocabulary_loss(hidden, weight, labels, label_smoothing)


class _PackedVocabulary(Vocabulary):
    """A whole table whose weights stay as they are: from the second call on, logits come from a packed copy."""

    def __init__(self) -> None:
        self._called = False
        self._packed: PackedMatrix | None = None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if not can_pack(hidden, weight):
            return super().logits(hidden, weight)
        if self._packed is None and self._called:
            self._packed = PackedMatrix(weight)
        self._called = True  # packing takes as long as one call
        return super().logits(hidden, weight) if self._packed is None else self._packed(hidden)


class TokenEmbedding(nn.Module):
    """A table of token vectors that maps ids to vectors and hidden states to logits.

    Either way vectors enter the network, and logits leave it, with unit variance at the start; what differs is how
    fast the table moves. Adam's steps have one size whatever the weights', so small weights learn faster.

    Args:
        vocab_size: V.
        dim: D.
        scale: "input" = weights of std 1 / sqrt(D), multiplied by sqrt(D) on the way in (the Transformer; right for
            Adam). "output" = weights of std 1, hidden states divided by sqrt(D) on the way out (T5; its Adafactor
            scales steps by the size of the weights). "none" = weights of std 1 / sqrt(D), used as they are (NLLB
            without `scale_embedding`, T5 with separate tables).

    Attributes:
        vocabulary: how ids and hidden states meet the table; exchanged where processes hold parts of it.

    Raises:
        ValueError: if `scale` is none of the three.

    Source: arXiv:1706.03762 section 3.4; arXiv:1910.10683 (released code).
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("vocab", "embed")}

    def __init__(self, vocab_size: int, dim: int, *, scale: EmbeddingScale = "input") -> None:
        super().__init__()
        if scale not in ("input", "output", "none"):
            raise ValueError(f'embedding scale must be "input", "output" or "none": got {scale!r}.')
        self.scale: EmbeddingScale = scale
        self.vocabulary = Vocabulary()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    @property
    def std(self) -> float:
        """Standard deviation of the weights at the start."""
        return 1.0 if self.scale == "output" else float(self.weight.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors Float[..., D] of ids Int64[...]."""
        vectors = self.vocabulary.vectors(ids, self.weight)
        return vectors * self.weight.shape[1] ** 0.5 if self.scale == "input" else vectors

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits Float[..., V] of hidden states Float[..., D]."""
        return self.vocabulary.logits(self._scaled(hidden), self.weight)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
        """Cross-entropy of the logits of hidden states Float[N, D] where `labels` Int64[N] are right.

        It equals `moekit.kernels.logits_loss` of `logits`, and never holds all of them: see
        `moekit.kernels.vocabulary_loss`.
        """
        return self.vocabulary.cross_entropy(self._scaled(hidden), self.weight, labels, label_smoothing)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight.shape[1] ** -0.5 if self.scale == "output" else hidden


@contextmanager
def packed_logits(model: object) -> Iterator[None]:
    """Inside, the weights of a model do not change, and the logits of its tables are computed many times.

    On a CPU the tables are packed meanwhile (`moekit.kernels.packed_matrix`), where they are whole and no gradient is
    wanted. Logits are the same up to rounding.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    whole = [m for m in modules if isinstance(m, TokenEmbedding) and type(m.vocabulary) is Vocabulary]
    for table in whole:
        table.vocabulary = _PackedVocabulary()
    try:
        yield
    finally:
        for table in whole:
            table.vocabulary = Vocabulary()
