"""Small transformers and a batch for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moekit import experts, routers
from moekit.layer import MoELayer
from moekit.routing import Routing
from moekit.transformer import (
    DecoderOnly,
    EncoderDecoder,
    Positions,
    RelativePositions,
    RotaryPositions,
    SinusoidalPositions,
    every_other,
)

VOCAB, DIM, HEADS = 31, 16, 4
POSITIONS: dict[str, Callable[[], Positions]] = {
    "relative": lambda: RelativePositions(HEADS),
    "rotary": RotaryPositions,
    "sinusoidal": SinusoidalPositions,
}


def sparse(layer: int, side: str) -> nn.Module:
    return MoELayer(routers.switch(DIM, 4, capacity_factor=None, jitter=0.0), experts.GroupedMLP(4, DIM, 24))


def seq2seq(positions: Positions | None = None, *, moe: bool = True, **options: object) -> EncoderDecoder:
    torch.manual_seed(0)
    feed = every_other(sparse) if moe else None
    return EncoderDecoder(VOCAB, DIM, HEADS, 2, 2, 24, feed_forward=feed, positions=positions, **options)  # type: ignore[arg-type]


def language_model(positions: Positions | None = None, **options: object) -> DecoderOnly:
    torch.manual_seed(0)
    return DecoderOnly(VOCAB, DIM, HEADS, 2, 24, feed_forward=every_other(sparse), positions=positions, **options)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source, its mask, target, its mask."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, VOCAB, (3, 7), generator=generator)
    target = torch.randint(3, VOCAB, (3, 6), generator=generator)
    source_mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    target_mask = torch.arange(6) < torch.tensor([3, 6, 5])[:, None]
    return source.masked_fill(~source_mask, 0), source_mask, target.masked_fill(~target_mask, 0), target_mask


def run(model: EncoderDecoder, language: Tensor | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
    source, source_mask, target, target_mask = batch()
    encoded = model.encode(source, source_mask, language)
    decoded = model.decode(target, encoded.hidden, source_mask, target_mask, language)
    return model.logits(decoded.hidden[target_mask]), encoded.routings + decoded.routings
