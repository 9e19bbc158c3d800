"""The shape of a transformer small enough for torch, and a reader, to count."""

from __future__ import annotations

from moekit.planner import TransformerShape

TINY = TransformerShape(
    name="tiny",
    vocab_size=96,
    dim=64,
    heads=4,
    hidden_dim=128,
    encoder_layers=4,
    decoder_layers=2,
    num_experts=8,
)
