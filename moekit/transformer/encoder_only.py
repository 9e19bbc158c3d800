"""The encoder-only transformer (generators of masked tokens, discriminators, classifiers)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from moekit.component import Component
from moekit.transformer.embedding import EmbeddingScale, TokenEmbedding
from moekit.transformer.init import init_weights
from moekit.transformer.output import StackOutput
from moekit.transformer.routed_layers import routed_layers
from moekit.transformer.stack import StackOptions, build_stack


class EncoderOnly(Component):
    """A pre-norm encoder in which any layer's feed-forward may be a Mixture of Experts.

    Args:
        vocab_size: V.
        dim: D.
        heads: H.
        layers: number of blocks.
        hidden_dim: F of dense feed-forwards.
        tied: one table embeds tokens and makes the logits; else two.
        embedding_scale: see `TokenEmbedding`.
        pad_id: see `Stack`.
        **options: see `build_stack`.

    Example:
        >>> import torch
        >>> model = EncoderOnly(100, 16, 4, layers=2, hidden_dim=32)
        >>> model.logits(model.encode(torch.randint(3, 100, (2, 7))).hidden).shape
        torch.Size([2, 7, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        heads: int,
        layers: int,
        hidden_dim: int,
        *,
        tied: bool = True,
        embedding_scale: EmbeddingScale = "input",
        pad_id: int = 0,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.pad_id = vocab_size, dim, pad_id
        self.embedding = TokenEmbedding(vocab_size, dim, scale=embedding_scale)
        self.output = None if tied else TokenEmbedding(vocab_size, dim, scale=embedding_scale)
        self.encoder = build_stack("encoder", layers, dim, heads, hidden_dim, pad_id=pad_id, **options)
        init_weights(self)

    @property
    def routed_layers(self) -> tuple[str, ...]:
        """Names of the sparse layers, ``encoder.1`` and so on, in the order of the routings of `encode`."""
        return tuple(routed_layers(self))

    def encode(
        self, source_ids: Tensor, source_mask: Tensor | None = None, language: Tensor | None = None
    ) -> StackOutput:
        """Hidden states of every token; arguments as in `EncoderDecoder.encode`."""
        return self.encoder(self.embedding(source_ids), source_ids, source_mask, language)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits Float[..., V] of hidden states Float[..., D]: give it the places that matter, flattened or not."""
        return (self.embedding if self.output is None else self.output).logits(hidden)
