"""What SwitchTransformers, NllbMoe and our encoder-decoder can all say, and the model that it describes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from torch import nn

from moekit.experts import GroupedMLP
from moekit.functional.activation import Activation
from moekit.layer import MoELayer
from moekit.mixing import ExpertOutputMasking
from moekit.routers import (
    AllChoices,
    InputJitter,
    RandomChoice,
    SampledChoice,
    SecondExpertPolicy,
    SequenceCapacity,
    TopKRouter,
)
from moekit.transformer import (
    MLP,
    EncoderDecoder,
    LayerNorm,
    Positions,
    RelativePositions,
    RMSNorm,
    Side,
    SplitSinusoidalPositions,
)
from moekit.transformer.embedding import EmbeddingScale

Kind = Literal["switch_transformers", "nllb-moe"]
SecondExpert = Literal["all", "sampling", "random"]

NAMES: dict[Kind, str] = {
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "nllb-moe": "NllbMoeForConditionalGeneration",
}
"""Classes of transformers by ``model_type``."""


@dataclass(frozen=True)
class TokenIds:
    """Ids with a meaning of their own; the defaults are those of moekit's tokenizer.

    Attributes:
        pad: padding.
        bos: what a target begins with (``decoder_start_token_id``).
        eos: what a target ends with.
    """

    pad: int = 0
    bos: int = 1
    eos: int = 2


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An encoder-decoder of one of the two families.

    Of SwitchTransformers: RMS norm, relative positions, one expert per token. Of NllbMoe: layer norm, split sinusoids,
    two experts per token.

    Attributes:
        kind: the family, ``model_type`` in ``config.json``.
        vocab_size: V.
        dim: D.
        heads: H.
        head_dim: channels per head.
        encoder_layers: blocks.
        decoder_layers: blocks.
        encoder_hidden_dim: F of the encoder's feed-forwards and experts.
        decoder_hidden_dim: F of the decoder's.
        encoder_sparse: numbers of the encoder's sparse layers.
        decoder_sparse: numbers of the decoder's.
        num_experts: E; 1 where nothing is sparse.
        activation: of feed-forwards and experts.
        norm_eps: of all norms.
        tied: one table, or three.
        bias: whether attention and feed-forwards have biases.
        embedding_scale: see `moekit.transformer.TokenEmbedding`.
        attention_scale: see `moekit.transformer.SelfAttention`.
        num_buckets: of relative positions.
        max_distance: of relative positions.
        first_position: of sinusoids.
        jitter: of the router's input in training.
        limit: of `SequenceCapacity`; None = dropless.
        renormalise: of two weights, see `TopKRouter`; "none" for one.
        second_expert: which second experts are sent in training.
        output_masking: probability of expert output masking.
        dropout: on embeddings and branches.
        attention_dropout: on attention weights.
        hidden_dropout: on hidden activations.
        final_dropout: after the last norm.
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

    @property
    def k(self) -> int:
        """Experts per token."""
        return 1 if self.kind == "switch_transformers" else 2

    def build(self, *, pad_id: int) -> EncoderDecoder:
        """The model; under ``torch.device("meta")`` without memory.

        Raises:
            ValueError: if sizes do not fit each other.
        """
        switch = self.kind == "switch_transformers"
        positions: Positions
        if switch:
            positions = RelativePositions(self.heads, num_buckets=self.num_buckets, max_distance=self.max_distance)
        else:
            positions = SplitSinusoidalPositions(first=self.first_position)
        return EncoderDecoder(
            self.vocab_size,
            self.dim,
            self.heads,
            self.encoder_layers,
            self.decoder_layers,
            self.encoder_hidden_dim,
            tied=self.tied,
            embedding_scale=self.embedding_scale,
            pad_id=pad_id,
            feed_forward=self._feed_forward,
            positions=positions,
            norm=functools.partial(RMSNorm if switch else LayerNorm, eps=self.norm_eps),
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention_scale=self.attention_scale,
            final_dropout=self.final_dropout,
            head_dim=self.head_dim,
            bias=self.bias,
        )

    def _feed_forward(self, layer: int, side: Side, /) -> nn.Module:
        hidden_dim, activation, dropout = self.hidden_dim[side], self.activation, self.hidden_dropout
        if layer not in self.sparse[side]:
            return MLP(self.dim, hidden_dim, activation=activation, dropout=dropout, bias=self.bias)
        later: dict[SecondExpert, SecondExpertPolicy] = {
            "all": AllChoices(), "sampling": SampledChoice(), "random": RandomChoice(0.5),
        }  # fmt: skip
        router = TopKRouter(
            self.dim,
            self.num_experts,
            self.k,
            capacity=None if self.limit is None else SequenceCapacity(self.limit),
            renormalise=self.renormalise,
            second_expert=later[self.second_expert],
            exploration=InputJitter(self.jitter) if self.jitter else None,
        )
        bank = GroupedMLP(
            self.num_experts, self.dim, hidden_dim, activation=activation, dropout=dropout, bias=self.bias
        )
        masking = ExpertOutputMasking(self.output_masking) if self.output_masking else None
        return MoELayer(router, bank, output_masking=masking)
