"""The transformers: encoder-only, decoder-only, encoder-decoder; and what every model of tokens has."""

from __future__ import annotations

import copy
from typing import ClassVar, Unpack

from torch import Tensor, nn

from moekit.component import Component
from moekit.kernels.vocabulary_loss import TokenLoss, logits_loss
from moekit.transformer.cache import DecoderCache
from moekit.transformer.embedding import EmbeddingScale, TokenEmbedding
from moekit.transformer.feed_forward import Side
from moekit.transformer.init import init_weights
from moekit.transformer.output import DecoderOutput, StackOutput
from moekit.transformer.stack import Stack, StackOptions, build_stack


def routed_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    """Sparse layers of a backbone by their names, an encoder's before a decoder's.

    ``encoder.1`` is the feed-forward of the encoder's block 1. Logs, reports and commands use these names.
    """
    stacks = {side: getattr(backbone, side, None) for side in ("encoder", "decoder")}
    return {
        f"{side}.{number}": stack.blocks[number].feed_forward
        for side, stack in stacks.items()
        if stack is not None
        for number in stack.routed_layers
    }


class TokenModel(Component):
    """Tables of token vectors around stacks that a subclass makes as `encoder` and `decoder`.

    Args:
        vocab_size: V.
        dim: D.
        tied: `embedding` embeds all tokens and makes the logits; else `separate_tables` name the other tables.
        embedding_scale: scale of `TokenEmbedding`.
        pad_id: that of `Stack`.
    """

    separate_tables: ClassVar[tuple[str, ...]] = ("output",)
    output: TokenEmbedding | None

    def __init__(
        self, vocab_size: int, dim: int, *, tied: bool, embedding_scale: EmbeddingScale = "input", pad_id: int
    ) -> None:
        super().__init__()
        self.vocab_size, self.dim, self.pad_id = vocab_size, dim, pad_id
        self.embedding = TokenEmbedding(vocab_size, dim, scale=embedding_scale)
        for name in self.separate_tables:
            setattr(self, name, None if tied else TokenEmbedding(vocab_size, dim, scale=embedding_scale))

    @property
    def routed_layers(self) -> tuple[str, ...]:
        """Names of the sparse layers, ``encoder.1`` and so on: those of `encode`, then those of `decode`."""
        return tuple(routed_layers(self))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits Float[..., V] of hidden states Float[..., D]: give it the places that matter, flattened or not."""
        return self._scorer.logits(hidden)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> TokenLoss:
        """Cross-entropy of the `logits` of ``hidden`` Float[N, D] where `labels` Int64[N] are right.

        A model with logits of its own gets the loss of those; else they are never all held at once.
        """
        if getattr(self.logits, "__func__", None) is not TokenModel.logits:
            return logits_loss(self.logits(hidden), labels, label_smoothing)
        return self._scorer.cross_entropy(hidden, labels, label_smoothing)

    @property
    def _scorer(self) -> TokenEmbedding:
        return self.embedding if self.output is None else self.output


class _OneStack(TokenModel):
    """A model of one stack, which is named as its side."""

    side: ClassVar[Side]

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
        super().__init__(vocab_size, dim, tied=tied, embedding_scale=embedding_scale, pad_id=pad_id)
        setattr(self, self.side, build_stack(self.side, layers, dim, heads, hidden_dim, pad_id=pad_id, **options))
        init_weights(self)


class EncoderOnly(_OneStack):
    """A pre-norm encoder in which any layer's feed-forward may be a Mixture of Experts.

    Args:
        vocab_size: V.
        dim: D.
        heads: H.
        layers: number of blocks.
        hidden_dim: F of dense feed-forwards.
        tied: one table embeds tokens and makes the logits; else two.
        embedding_scale: scale of `TokenEmbedding`.
        pad_id: that of `Stack`.
        **options: those of `build_stack`.

    Example:
        >>> import torch
        >>> model = EncoderOnly(100, 16, 4, layers=2, hidden_dim=32)
        >>> model.logits(model.encode(torch.randint(3, 100, (2, 7))).hidden).shape
        torch.Size([2, 7, 100])
    """

    side = "encoder"
    encoder: Stack

    def encode(
        self, source_ids: Tensor, source_mask: Tensor | None = None, language: Tensor | None = None
    ) -> StackOutput:
        """Hidden states of every token.

        Args:
            source_ids: Int64[B, S].
            source_mask: Bool[B, S], True = a real token; None = all are. Padding may stand on the right, on the left,
                and, unless positions are `RelativePositions`, anywhere: it has no place in the order of tokens.
            language: Int64[B], told to routers as the task of every token.
        """
        return self.encoder(self.embedding(source_ids), source_ids, source_mask, language)


class DecoderOnly(_OneStack):
    """A pre-norm causal transformer in which any layer's feed-forward may be a Mixture of Experts.

    Its arguments are those of `EncoderOnly`.

    Example:
        >>> import torch
        >>> model = DecoderOnly(100, 16, 4, layers=2, hidden_dim=32)
        >>> model.logits(model.decode(torch.randint(3, 100, (2, 7))).hidden).shape
        torch.Size([2, 7, 100])
    """

    side = "decoder"
    decoder: Stack

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
            mask: Bool[B, T], True = a real token; padding on the right only.
            language: Int64[B], told to routers as the task of every token.
            cache: from `new_cache`; changed in place. For inference.
        """
        output = self.decoder(self.embedding(ids), ids, mask, language, cache=cache)
        return DecoderOutput(output.hidden, output.routings, cache)


class EncoderDecoder(TokenModel):
    """A pre-norm encoder-decoder in which any layer's feed-forward may be a Mixture of Experts.

    The arguments that are not here are those of `EncoderOnly`.

    Args:
        encoder_layers: blocks of the encoder.
        decoder_layers: blocks of the decoder.
        tied: one table embeds source and target and makes the logits; else three tables.
        **options: those of `build_stack`. `positions` with weights are copied, so that each side has its own.

    Source: arXiv:1706.03762; relative positions, no biases: arXiv:1910.10683. Differs: by default logits of attention
    and embeddings on the way in are scaled and nothing is dropped after the final norm; T5's ways are
    ``attention_scale=1.0, embedding_scale="output", final_dropout=...``.

    Example:
        >>> import torch
        >>> model = EncoderDecoder(100, 16, 4, encoder_layers=2, decoder_layers=2, hidden_dim=32)
        >>> memory = model.encode(torch.randint(3, 100, (2, 5))).hidden
        >>> model.logits(model.decode(torch.randint(3, 100, (2, 7)), memory).hidden).shape
        torch.Size([2, 7, 100])
    """

    separate_tables = ("target_embedding", "output")
    target_embedding: TokenEmbedding | None

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        hidden_dim: int,
        *,
        tied: bool = True,
        embedding_scale: EmbeddingScale = "input",
        pad_id: int = 0,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(vocab_size, dim, tied=tied, embedding_scale=embedding_scale, pad_id=pad_id)
        self.encoder = build_stack("encoder", encoder_layers, dim, heads, hidden_dim, pad_id=pad_id, **options)
        if options.get("positions") is not None:
            options["positions"] = copy.deepcopy(options["positions"])
        self.decoder = build_stack(
            "decoder", decoder_layers, dim, heads, hidden_dim, cross_attention=True, pad_id=pad_id, **options
        )
        init_weights(self)

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`."""
        return DecoderCache(len(self.decoder.layers))

    def encode(
        self, source_ids: Tensor, source_mask: Tensor | None = None, language: Tensor | None = None
    ) -> StackOutput:
        """Encode the source; arguments as in `EncoderOnly.encode`."""
        return self.encoder(self.embedding(source_ids), source_ids, source_mask, language)

    def decode(
        self,
        target_ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        language: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> DecoderOutput:
        """Hidden states from which the token after each target token is predicted.

        Args:
            target_ids: Int64[k*B, T]. With a cache only the tokens that it has not seen. k > 1: neighbouring rows
                are beams of one sentence and share its memory.
            memory: Float[B, S, D], the encoder's hidden states.
            memory_mask: Bool[B, S].
            target_mask: Bool[k*B, T], for routers; padding on the right only.
            language: Int64[k*B], told to routers as the task of every token.
            cache: from `new_cache`; changed in place. For inference.

        Raises:
            ValueError: if rows are no multiple of the memory's.
        """
        if target_ids.shape[0] % max(memory.shape[0], 1):
            raise ValueError(
                "decode needs a multiple of the memory's rows: got "
                f"{target_ids.shape[0]} target rows and {memory.shape[0]} memories."
            )
        embedding = self.embedding if self.target_embedding is None else self.target_embedding
        output = self.decoder(
            embedding(target_ids),
            target_ids,
            target_mask,
            language,
            memory=memory,
            memory_mask=memory_mask,
            cache=cache,
        )
        return DecoderOutput(output.hidden, output.routings, cache)
