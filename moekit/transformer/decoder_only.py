"""The decoder-only transformer (language model)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from moekit.component import Component
from moekit.transformer.cache import DecoderCache
from moekit.transformer.embedding import EmbeddingScale, TokenEmbedding
from moekit.transformer.init import init_weights
from moekit.transformer.output import DecoderOutput
from moekit.transformer.routed_layers import routed_layers
from moekit.transformer.stack import StackOptions, build_stack


class DecoderOnly(Component):
    """A pre-norm causal transformer in which any layer's feed-forward may be a Mixture of Experts.

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
        >>> model = DecoderOnly(100, 16, 4, layers=2, hidden_dim=32)
        >>> model.logits(model.decode(torch.randint(3, 100, (2, 7))).hidden).shape
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
        self.decoder = build_stack("decoder", layers, dim, heads, hidden_dim, pad_id=pad_id, **options)
        init_weights(self)

    @property
    def routed_layers(self) -> tuple[str, ...]:
        """Names of the sparse layers, ``decoder.1`` and so on, in the order of the routings of `decode`."""
        return tuple(routed_layers(self))

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`."""
        return DecoderCache(len(self.decoder.layers))

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        language: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> DecoderOutput:
        """Hidden states from which the token after each token is predicted.

        Args:
            ids: Int64[B, T]. With a cache only the tokens that it has not seen.
            mask: Bool[B, T], for routers; padding on the right only.
            language: Int64[B], told to routers as the task of every token.
            cache: from `new_cache`; changed in place. For inference.
        """
        output = self.decoder(self.embedding(ids), ids, mask, language, cache=cache)
        return DecoderOutput(output.hidden, output.routings, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits Float[..., V] of hidden states Float[..., D]: give it the places that matter, flattened or not."""
        return (self.embedding if self.output is None else self.output).logits(hidden)
