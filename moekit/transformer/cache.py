"""Keys and values that a decoder has already computed, so that a step costs one token and not the whole prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.transformer.positions import Positions

_GROWTH = 32  # a full buffer grows by its own length, at least by this much


class LayerCache:
    """One layer's keys and values: of its own earlier tokens, and of the memory it attends to.

    The buffer is ``[place, 2, row, head, channel]``, so that appending a token writes one contiguous piece and
    reordering rows copies only the places in use. Two buffers take turns, so that reordering needs no new memory.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._spare: Tensor | None = None  # what the buffer was before the last reordering
        self._length = 0
        self.memory: tuple[Tensor, Tensor] | None = None
        self.memory_mask: Tensor | None = None  # what is added for hidden places, Float[B, H, 1, S]

    def append(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values, Float[R, Q, 2, H, D_head]; returns all so far as Float[R, H, K, D_head] views."""
        rows, new, _, heads, channels = pair.shape
        end = self._length + new
        if self._buffer is None or end > self._buffer.shape[0]:
            room = end + max(self._length, _GROWTH)
            grown = pair.new_empty(room, 2, rows, heads, channels)
            if self._buffer is not None:
                grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        self._buffer[self._length : end] = pair.permute(1, 2, 0, 3, 4)
        self._length = end
        keys, values = self._buffer[:end].permute(1, 2, 3, 0, 4).unbind(0)
        return keys, values

    def reorder(self, rows: Tensor) -> None:
        """Keep rows `rows` Int64[R'], in that order."""
        if self._buffer is not None:
            old, spare = self._buffer, self._spare
            shape = (old.shape[0], 2, rows.numel(), *old.shape[3:])
            self._buffer = spare if spare is not None and spare.shape == shape else old.new_empty(shape)
            torch.index_select(old[: self._length], 2, rows, out=self._buffer[: self._length])
            self._spare = old

    def select_memory(self, sentences: Tensor) -> None:
        """Keep the memory of `sentences` Int64[B']."""
        if self.memory is not None:
            keys, values = self.memory
            keys = keys.transpose(2, 3).index_select(0, sentences).transpose(2, 3)  # as they lay: see `CrossAttention`
            self.memory = keys, values.index_select(0, sentences)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, sentences)


class DecoderCache:
    """All layers' caches, and what routing needs to know of the past. For inference: it is changed in place.

    Attributes:
        layers: one `LayerCache` per block.
        length: tokens seen so far by every row.
        last_ids: Int64[R], the last token of every row; None before the first.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0
        self.last_ids: Tensor | None = None
        self._biases: Tensor | None = None  # of distances, the largest first

    def bias(self, positions: Positions, x: Tensor) -> Tensor | None:
        """What `positions` add to the logits of the one token that comes next, Float[H, 1, length + 1]; or None.

        A bias depends on distances only, so those of many steps are worked out at once.

        Args:
            positions: the idea of order; the same in all calls.
            x: only its device matters.
        """
        known = 0 if self._biases is None else self._biases.shape[-1]
        if known <= self.length:
            place = torch.arange(max(2 * self.length, _GROWTH), device=x.device)
            self._biases = positions.bias(place[-1:], place, causal=True)
        return None if self._biases is None else self._biases[..., -self.length - 1 :]

    def advance(self, ids: Tensor) -> None:
        """Note that tokens Int64[R, Q] have been seen; the decoder calls this after its blocks."""
        self.length += ids.shape[1]
        self.last_ids = ids[:, -1]

    def reorder(self, rows: Tensor) -> None:
        """Keep rows `rows` Int64[R'] (beams that survive, each possibly several times), in that order."""
        for layer in self.layers:
            layer.reorder(rows)
        if self.last_ids is not None:
            self.last_ids = self.last_ids.index_select(0, rows)

    def select_memory(self, sentences: Tensor) -> None:
        """Keep the encoder memory of `sentences` Int64[B'] only; rows are reordered apart."""
        for layer in self.layers:
            layer.select_memory(sentences)
