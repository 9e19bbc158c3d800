"""Transformers whose blocks take any feed-forward: encoder-decoder, decoder-only, encoder-only."""

from moekit.transformer.attention import AttentionPlan, CrossAttention, SelfAttention
from moekit.transformer.block import Block, RoutedFeedForward
from moekit.transformer.cache import DecoderCache
from moekit.transformer.embedding import TokenEmbedding
from moekit.transformer.feed_forward import (
    GLU,
    MLP,
    FeedForwardFactory,
    Side,
    SparseDense,
    at_layers,
    every_other,
    pyramid,
)
from moekit.transformer.init import init_weights, init_weights_by_name, materialize, materialize_modules
from moekit.transformer.models import DecoderOnly, EncoderDecoder, EncoderOnly, routed_layers
from moekit.transformer.norms import LayerNorm, RMSNorm, RMSNormWithoutScale
from moekit.transformer.output import BlockOutput, DecoderOutput, StackOutput
from moekit.transformer.positions import (
    Positions,
    RelativePositions,
    RotaryPositions,
    SinusoidalPositions,
    SplitSinusoidalPositions,
)
from moekit.transformer.stack import Stack, build_stack

__all__ = [
    "GLU",
    "MLP",
    "AttentionPlan",
    "Block",
    "BlockOutput",
    "CrossAttention",
    "DecoderCache",
    "DecoderOnly",
    "DecoderOutput",
    "EncoderDecoder",
    "EncoderOnly",
    "FeedForwardFactory",
    "LayerNorm",
    "Positions",
    "RMSNorm",
    "RMSNormWithoutScale",
    "RelativePositions",
    "RotaryPositions",
    "RoutedFeedForward",
    "SelfAttention",
    "Side",
    "SinusoidalPositions",
    "SparseDense",
    "SplitSinusoidalPositions",
    "Stack",
    "StackOutput",
    "TokenEmbedding",
    "at_layers",
    "build_stack",
    "every_other",
    "init_weights",
    "init_weights_by_name",
    "materialize",
    "materialize_modules",
    "pyramid",
    "routed_layers",
]
