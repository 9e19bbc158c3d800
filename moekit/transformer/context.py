"""What routers are told about the tokens of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.routing import DecodingContext, RoutingContext
from moekit.transformer.cache import DecoderCache
from moekit.transformer.padding import count_real, next_real, previous_real


def routing_context(
    ids: Tensor,
    mask: Tensor | None,
    language: Tensor | None,
    *,
    pad_id: int,
    cache: DecoderCache | None = None,
) -> RoutingContext:
    """The context of a batch of sequences, flattened to ``[B * S]``. Padding is no neighbour and is not counted.

    Args:
        ids: Int64[B, S].
        mask: Bool[B, S], True = a real token.
        language: Int64[B], the task of every token of the sequence.
        pad_id: stands for the token before the first and the token after the last.
        cache: where decoding has come to: gives the place and the token before. The token after is unknown then.

    Raises:
        ValueError: if `language` does not have one entry per sequence.
    """
    rows, length = ids.shape
    if language is not None and language.shape != (rows,):
        raise ValueError(
            f"language must hold one id per sequence: got shape {tuple(language.shape)} for {rows} sequences."
        )
    first = ids.new_full((rows,), pad_id) if cache is None or cache.last_ids is None else cache.last_ids
    start = 0 if cache is None else cache.length
    place = torch.arange(start, start + length, device=ids.device).expand(rows, length)
    row = torch.arange(rows, device=ids.device)
    kind = RoutingContext if cache is None else DecodingContext
    return kind(
        mask=mask,
        token_ids=ids,
        previous_ids=previous_real(ids, mask, first),
        next_ids=None if cache is not None else next_real(ids, mask, ids.new_full((rows,), pad_id)),
        position=place if mask is None else start + count_real(mask),
        task=None if language is None else language[:, None].expand(rows, length),
        sequence=row[:, None].expand(rows, length),
    ).flatten(rows * length)
