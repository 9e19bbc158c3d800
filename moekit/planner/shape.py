"""A transformer by its numbers, and three published ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from moekit.experts import Experts, GroupedGLU, GroupedMLP
from moekit.functional.activation import Activation
from moekit.layer import MoELayer
from moekit.routers import TopKRouter
from moekit.routing import Capacity, Share
from moekit.transformer import (
    GLU,
    MLP,
    DecoderOnly,
    EncoderDecoder,
    EncoderOnly,
    LayerNorm,
    RMSNorm,
    Side,
    SinusoidalPositions,
    every_other,
)


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """A transformer with a Mixture of Experts in every so-manieth layer, described and not built.

    Attributes:
        name: shown in tables.
        vocab_size: V.
        dim: D.
        heads: H.
        hidden_dim: F of dense feed-forwards.
        encoder_layers: 0 = no encoder.
        decoder_layers: 0 = no decoder.
        head_dim: channels per head; None = D / H.
        num_experts: E in every sparse layer; 0 = dense.
        k: experts per token.
        capacity_factor: slots of an expert as a multiple of an even share; None = dropless.
        capacity_share: what that share is of (`moekit.routing.Capacity`).
        sparse_every: distance of sparse layers; the last of each group is sparse.
        expert_hidden_dim: F of an expert; None = `hidden_dim`.
        beside: F of a dense feed-forward that every token of a sparse layer takes too; 0 = none.
        gated: whether feed-forwards and experts are gated linear units (three matrices) or not (two).
        activation: that of feed-forwards and experts.
        norm: "layer" or "rms".
        tied: whether one table embeds tokens and makes the logits.

    Raises:
        ValueError: if there are no layers, or `sparse_every` is below 1.
    """

    name: str = "model"
    vocab_size: int
    dim: int
    heads: int
    hidden_dim: int
    encoder_layers: int = 0
    decoder_layers: int = 0
    head_dim: int | None = None
    num_experts: int = 0
    k: int = 1
    capacity_factor: float | None = 1.0
    capacity_share: Share = "choices"
    sparse_every: int = 2
    expert_hidden_dim: int | None = None
    beside: int = 0
    gated: bool = False
    activation: Activation = "relu"
    norm: Literal["layer", "rms"] = "layer"
    tied: bool = True

    def __post_init__(self) -> None:
        if self.encoder_layers + self.decoder_layers < 1 or min(self.encoder_layers, self.decoder_layers) < 0:
            raise ValueError(
                f"TransformerShape needs layers: got encoder_layers={self.encoder_layers} and "
                f"decoder_layers={self.decoder_layers}. Give at least one of them a positive number."
            )
        if self.sparse_every < 1:
            raise ValueError(f"TransformerShape.sparse_every must be at least 1: got {self.sparse_every}.")

    def count_layers(self, side: Side, *, sparse: bool) -> int:
        """How many layers of a side have experts, or a dense feed-forward."""
        layers = self.encoder_layers if side == "encoder" else self.decoder_layers
        with_experts = layers // self.sparse_every if self.num_experts else 0
        return with_experts if sparse else layers - with_experts

    def shortened(self) -> TransformerShape:
        """The same with as few layers as hold one of each kind: what costs need to be read from."""
        return replace(
            self,
            encoder_layers=min(self.encoder_layers, self.sparse_every),
            decoder_layers=min(self.decoder_layers, self.sparse_every),
        )

    def module(self) -> EncoderDecoder | EncoderOnly | DecoderOnly:
        """The model on the meta device: parameters with shapes and without memory."""

        def dense(hidden_dim: int) -> nn.Module:
            return (GLU if self.gated else MLP)(self.dim, hidden_dim, activation=self.activation)

        def sparse(layer: int, side: Side, /) -> nn.Module:
            hidden_dim = self.expert_hidden_dim or self.hidden_dim
            bank = GroupedGLU if self.gated else GroupedMLP
            experts: Experts = bank(self.num_experts, self.dim, hidden_dim, activation=self.activation)
            capacity = Capacity(train=self.capacity_factor, share=self.capacity_share)
            router = TopKRouter(self.dim, self.num_experts, self.k, capacity=capacity)
            return MoELayer(router, experts, shared=dense(self.beside) if self.beside else None)

        def plain(layer: int, side: Side, /) -> nn.Module:
            return dense(self.hidden_dim)

        start, every = self.sparse_every - 1, self.sparse_every
        choice = every_other(sparse, plain, start=start, every=every) if self.num_experts else plain
        widths = self.vocab_size, self.dim, self.heads
        with torch.device("meta"):
            options: dict[str, Any] = {
                "tied": self.tied,
                "head_dim": self.head_dim,
                "feed_forward": choice,
                "norm": LayerNorm if self.norm == "layer" else RMSNorm,
                "positions": SinusoidalPositions(),
            }
            if self.encoder_layers and self.decoder_layers:
                return EncoderDecoder(*widths, self.encoder_layers, self.decoder_layers, self.hidden_dim, **options)
            kind = EncoderOnly if self.encoder_layers else DecoderOnly
            return kind(*widths, self.encoder_layers or self.decoder_layers, self.hidden_dim, **options)


ZCODE_M3_10B = TransformerShape(
    name="Z-code M3 10B",
    vocab_size=250_000,
    dim=1024,
    heads=16,
    hidden_dim=4096,
    encoder_layers=24,
    decoder_layers=12,
    num_experts=64,
)
"""Z-code M3: 24 + 12 layers, 64 experts in every other one.

Source: arXiv:2109.10465 (10 billion parameters, 50 languages); the widths, which reproduce that number, are ours.
"""

ST_MOE_32B = TransformerShape(
    name="ST-MoE-32B",
    vocab_size=32_128,
    dim=5120,
    heads=64,
    head_dim=128,
    hidden_dim=20_480,
    encoder_layers=27,
    decoder_layers=27,
    num_experts=64,
    k=2,
    capacity_factor=1.25,
    capacity_share="tokens",
    sparse_every=4,
    beside=20_480,
    gated=True,
    activation="gelu",
    norm="rms",
)
"""ST-MoE-32B: 269 billion parameters, at the cost of a dense model of 32 billion.

Source: arXiv:2202.08906 table 11. Differs: T5's vocabulary; no relative position tables. The paper counts 269 billion;
with a full dense feed-forward beside each sparse layer this shape comes to 272, without to 269.
"""

DEEPSPEED_3_5T = replace(
    ZCODE_M3_10B, name="DeepSpeed MoE 3.5T", dim=6912, heads=48, hidden_dim=27_648, num_experts=512
)
"""3.5 trillion parameters, the size that DeepSpeed MoE reported on 512 devices.

Source: arXiv:2109.10465 (the size and the number of devices). The shape is ours: Z-code M3's depth, one expert per
device and sparse layer, and the width that gives the size; the authors do not publish theirs.
"""
