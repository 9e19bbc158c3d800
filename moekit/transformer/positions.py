"""How attention knows the order of tokens: one object per idea, all with the same three hooks.

A stack asks its `Positions` object once per forward and shares the answers over all layers. Positions hold no buffers,
so a model built on the meta device and materialised later is complete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines, Float[Q, D_head] or one table per row Float[B, Q, D_head], that turn queries and keys."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate Float[B, Q, H, D_head] in the precision of the cosines; the result has the type of `x`."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * self.cos[..., None, :] + turned * self.sin[..., None, :]).to(x.dtype)


class Positions(nn.Module):
    """No notion of order, and the base of those that have one: override the hook at which an idea acts.

    Positions count real tokens: where rows are padded, `embed` and `rotation` get a number per row and token, in which
    padding, wherever it stands, is not counted. `bias` gets places; see there.
    """

    def embed(self, x: Tensor, position: Tensor) -> Tensor:
        """Add to the embeddings Float[B, Q, D] of tokens at `position` Int64[Q] or Int64[B, Q]."""
        return x

    def rotation(self, position: Tensor, head_dim: int) -> Rotation | None:
        """How queries and keys at `position` Int64[Q] or Int64[B, Q] are rotated, or None."""
        return None

    def bias(self, query: Tensor, key: Tensor, *, causal: bool) -> Tensor | None:
        """What is added to attention logits, Float[H, Q, K], for places `query` Int64[Q] and `key` Int64[K], or None.

        The places are those in the padded row, the same for all rows, so a bias must depend on distances only. Padding
        at the ends changes no distance; between two tokens it would, and is refused.
        """
        return None


class SinusoidalPositions(Positions):
    """Fixed sin(p / 10000^(2i/D)) in even channels and the cosine in odd ones, added to the embeddings.

    Source: arXiv:1706.03762 section 3.5.
    """

    def embed(self, x: Tensor, position: Tensor) -> Tensor:  # noqa: D102
        dim = x.shape[-1]
        rate = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) * (-math.log(10_000.0) / dim)
        angle = position[..., None].to(torch.float32) * rate.exp()
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)[..., :dim]
        return x + table.to(x.dtype)


class SplitSinusoidalPositions(Positions):
    """Fixed sines in the first half of the channels and cosines in the second, added to the embeddings.

    Channel i and channel i + D/2 turn with the rate 10000^(-i / (D/2 - 1)), so the slowest rate is exactly 1 / 10000.

    Args:
        first: the number of the first token; fairseq counts from ``pad_id + 1``.

    Raises:
        ValueError: if `first` is negative.

    Source: the released code of tensor2tensor, which fairseq, Marian, M2M-100 and NLLB (arXiv:2207.04672) share.
    """

    def __init__(self, *, first: int = 0) -> None:
        super().__init__()
        if first < 0:
            raise ValueError(f"first must be at least 0: got {first}.")
        self.first = first

    def embed(self, x: Tensor, position: Tensor) -> Tensor:
        """Add the table's rows.

        Raises:
            ValueError: if there are fewer than four channels.
        """
        dim = x.shape[-1]
        half = dim // 2
        if half < 2:
            raise ValueError(f"SplitSinusoidalPositions need at least 4 channels: got {dim}.")
        rate = torch.arange(half, device=x.device, dtype=torch.float32) * -(math.log(10_000.0) / (half - 1))
        angle = (position[..., None] + self.first).to(torch.float32) * rate.exp()
        table = torch.cat((angle.sin(), angle.cos()), dim=-1)
        return x + nn.functional.pad(table, (0, dim - 2 * half)).to(x.dtype)


class RotaryPositions(Positions):
    """Queries and keys are rotated by an angle proportional to their position, so products see only distances.

    Args:
        base: the slowest pair of channels turns once in about 2 pi `base` positions.

    Source: arXiv:2104.09864 eq. 34. Differs: channel i is paired with i + D/2 (the layout of GPT-NeoX and Llama), not
    with its neighbour: the same model up to a permutation of channels.
    """

    def __init__(self, *, base: float = 10_000.0) -> None:
        super().__init__()
        self.base = base

    def rotation(self, position: Tensor, head_dim: int) -> Rotation:
        """Angles position * base^(-2i / D_head).

        Raises:
            ValueError: if the head dimension is odd.
        """
        if head_dim % 2:
            raise ValueError(
                f"RotaryPositions need an even head dimension: got {head_dim}. Change dim, heads or head_dim."
            )
        exponent = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
        angle = position[..., None].to(torch.float32) * self.base**-exponent
        angle = torch.cat((angle, angle), dim=-1)
        return Rotation(angle.cos(), angle.sin())


class RelativePositions(Positions):
    """T5's relative bias: a learned number per head and distance bucket, added to the logits of every layer.

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`; beyond it all
    distances share the last bucket. Where attention looks both ways, half of the buckets are for later keys.

    Args:
        heads: H.
        num_buckets: rows of the table.
        max_distance: where the last bucket begins.

    Raises:
        ValueError: if `num_buckets` is no multiple of 4, or `max_distance` not above its half.

    Source: arXiv:1910.10683 section 2.1.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("bucket", "heads")}

    def __init__(self, heads: int, *, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        if num_buckets < 4 or num_buckets % 4 or max_distance <= num_buckets // 2:
            raise ValueError(
                "RelativePositions need num_buckets a multiple of 4 and max_distance above num_buckets / 2: "
                f"got {num_buckets} and {max_distance}. T5 uses 32 and 128."
            )
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.weight = nn.Parameter(torch.zeros(num_buckets, heads))

    def bias(self, query: Tensor, key: Tensor, *, causal: bool) -> Tensor:  # noqa: D102
        bucket = relative_bucket(
            key[None, :] - query[:, None],
            two_sided=not causal,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return nn.functional.embedding(bucket, self.weight).permute(2, 0, 1)


def relative_bucket(offset: Tensor, *, two_sided: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of key position minus query position.

    Args:
        offset: Int64 of any shape.
        two_sided: whether later keys (positive offsets) have buckets of their own; else they share bucket 0.
        num_buckets: buckets altogether.
        max_distance: from here on, the last bucket.

    Source: arXiv:1910.10683 section 2.1; the logarithm's form is that of the released code.
    """
    side = num_buckets // 2 if two_sided else num_buckets
    distance = offset.abs() if two_sided else (-offset).clamp_min(0)
    exact = side // 2
    # clamp_min keeps the logarithm finite where it is not used.
    ratio = distance.clamp_min(exact).to(torch.float32) / exact
    grown = exact + (ratio.log() / math.log(max_distance / exact) * (side - exact)).to(torch.int64)
    bucket = torch.where(distance < exact, distance, grown.clamp_max(side - 1))
    return bucket + (offset > 0).to(torch.int64) * side if two_sided else bucket
