"""What SwitchTransformers, NllbMoe and our encoder-decoder can all say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.functional.activation import Activation
from moekit.transformer import Side
from moekit.transformer.embedding import EmbeddingScale

Kind = Literal["switch_transformers", "nllb-moe"]
SecondExpert = Literal["all", "sampling", "random"]

NAMES: dict[Kind, str] = {
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "nllb-moe": "NllbMoeForConditionalGeneration",
}
"""Classes of transformers by ``model_type``."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An encoder-decoder of one of the two families.

    Of SwitchTransformers: RMS norm, relative positions, one expert per token. Of NllbMoe: layer norm, split sinusoids,
    two experts per token.

    Attributes:
        kind: The family, which is ``model_type`` in ``config.json``.
        vocab_size: The size V of the vocabulary.
        dim: The model dimension D.
        heads: The number of attention heads H.
        head_dim: The number of channels per head.
        encoder_layers: The number of encoder blocks.
        decoder_layers: The number of decoder blocks.
        encoder_hidden_dim: The hidden size F of the encoder's feed-forwards and experts.
        decoder_hidden_dim: The hidden size F of the decoder's feed-forwards and experts.
        encoder_sparse: The numbers of the encoder's sparse layers.
        decoder_sparse: The numbers of the decoder's sparse layers.
        num_experts: The number of experts E, 1 where nothing is sparse.
        activation: The activation function of feed-forwards and experts.
        norm_eps: The epsilon of all norms.
        tied: Whether embeddings and logits share one table; otherwise there are three.
        bias: Whether attention and feed-forwards have biases.
        embedding_scale: Where embeddings are scaled; see `moekit.transformer.TokenEmbedding`.
        attention_scale: The factor of attention logits; see `moekit.transformer.SelfAttention`.
        num_buckets: The number of buckets of relative positions.
        max_distance: The largest distance that relative positions tell apart, in tokens.
        first_position: The number of the first position of sinusoids.
        jitter: The noise on the router's input in training; see `moekit.routers.InputJitter`.
        limit: The most tokens of a sequence per expert, as in `SequenceCapacity`; None = dropless.
        renormalise: When two weights are scaled to sum to 1; see `TopKRouter`. It is "none" for one.
        second_expert: Which second experts tokens are sent to in training.
        output_masking: The probability of expert output masking.
        dropout: The dropout rate on embeddings and branches.
        attention_dropout: The dropout rate on attention weights.
        hidden_dropout: The dropout rate on hidden activations.
        final_dropout: The dropout rate after the last norm.
    """

    kind: Kind
    vocab_size: int
    dim: int
    heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    encoder_hidden_dim: int
    decoder_hidden_dim: int
    encoder_sparse: tuple[int, ...] = ()
    decoder_sparse: tuple[int, ...] = ()
    num_experts: int = 1
    activation: Activation = "relu"
    norm_eps: float = 1e-6
    tied: bool = True
    bias: bool = False
    embedding_scale: EmbeddingScale = "output"
    attention_scale: float | None = None
    num_buckets: int = 32
    max_distance: int = 128
    first_position: int = 0
    jitter: float = 0.0
    limit: int | None = None
    renormalise: Literal["none", "before_drop", "after_drop"] = "none"
    second_expert: SecondExpert = "all"
    output_masking: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    final_dropout: float = 0.0

    @property
    def layers(self) -> dict[Side, int]:
        """Blocks by side."""
        return {"encoder": self.encoder_layers, "decoder": self.decoder_layers}

    @property
    def sparse(self) -> dict[Side, tuple[int, ...]]:
        """Sparse layers by side."""
        return {"encoder": self.encoder_sparse, "decoder": self.decoder_sparse}

    @property
    def hidden_dim(self) -> dict[Side, int]:
        """F by side."""
        return {"encoder": self.encoder_hidden_dim, "decoder": self.decoder_hidden_dim}
