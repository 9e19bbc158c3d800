"""Multi-head attention over oneself and over a memory, and the plan that all layers of a stack share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.functional.precision import autocast_dtype
from moekit.transformer import few_queries
from moekit.transformer.cache import DecoderCache, LayerCache
from moekit.transformer.padding import check_no_hole, count_real
from moekit.transformer.positions import Positions, Rotation
from moekit.transformer.projection import FusedLinear, projection


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, worked out once per forward.

    Attributes:
        mask: Bool (True = visible) or Float (added to the logits), broadcastable to ``[B, H, Q, K]``; None = all.
        is_causal: nobody sees later places; only where `mask` is None.
        rotation: how queries and new keys are rotated, or None.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    rotation: Rotation | None = None


def plan_attention(
    x: Tensor,
    positions: Positions,
    head_dim: int,
    *,
    offset: int,
    causal: bool,
    key_mask: Tensor | None = None,
    cache: DecoderCache | None = None,
) -> AttentionPlan:
    """Plan self-attention of `x` Float[B, Q, D], whose first token is at place `offset` behind cached keys.

    Args:
        x: only its shape, device and type matter.
        positions: the idea of order.
        head_dim: channels per head.
        offset: number of cached keys.
        causal: whether later keys are hidden.
        key_mask: Bool[B, K], True = a real token, nothing cached; None = all are.
        cache: where the cached keys are; it remembers what a bias is.

    Raises:
        ValueError: if there is padding between the tokens of a row and `positions` adds a bias by distance.
    """
    key = torch.arange(offset + x.shape[1], device=x.device)
    query = key[offset:]
    rotation = positions.rotation(query if key_mask is None else count_real(key_mask), head_dim)
    if cache is not None and causal and x.shape[1] == 1 and not torch.is_grad_enabled():
        bias = cache.bias(positions, x)
    else:
        bias = positions.bias(query, key, causal=causal)
    if bias is not None:
        check_no_hole(key_mask, positions)
    visible = None
    # A single new token sees every key, so one decoding step needs no causal mask.
    if causal and x.shape[1] > 1 and (offset > 0 or bias is not None):
        visible = key <= query[:, None]
    if key_mask is not None:
        keys = key_mask[:, None, None, :]
        visible = keys if visible is None else visible & keys
    if bias is None:
        return AttentionPlan(visible, causal and visible is None and x.shape[1] > 1, rotation)
    # Under autocast queries are in the lower precision, and so must be what is added to their products.
    bias = bias.to(autocast_dtype(x) or x.dtype)
    # Heads stood innermost in the table. Copied once, or the attention kernel of a GPU copies it in every layer.
    # Where few queries are few products, all rows have it side by side, as these take it.
    bias = bias.expand(len(x), -1, -1, -1).contiguous() if few_queries.suits(x[:, None]) else bias.contiguous()
    return AttentionPlan(bias if visible is None else bias.masked_fill(~visible, -torch.inf), False, rotation)


class _Attention(nn.Module):
    """Projections into heads, whose numbers of maps `inputs` gives by name, and back."""

    inputs: ClassVar[Mapping[str, int]]

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim must be divisible by heads: got {dim} and {heads}. Change one or give head_dim.")
        self.heads, self.head_dim, self.dropout, self.scale = heads, head_dim or dim // heads, dropout, scale
        inner = heads * self.head_dim
        for name, maps in self.inputs.items():
            self.add_module(name, projection(maps, dim, inner, bias=bias))
        self.out = nn.Linear(inner, dim, bias=bias)

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        """Float[B, Q, H * D_head] for Float[B, H, Q, D_head] and the other two Float[B, H, K, D_head]."""
        dropout = self.dropout if self.training else 0.0
        if few_queries.suits(query) and not dropout and not is_causal:
            return few_queries.attend(query, key, value, mask, self.scale).transpose(1, 2).flatten(2)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        return mixed.transpose(1, 2).flatten(2)


class SelfAttention(_Attention):
    """Multi-head attention of a sequence over itself; queries, keys and values come from one product.

    Args:
        dim: D.
        heads: H.
        head_dim: channels per head; None = D / H.
        dropout: probability on attention weights.
        bias: whether projections have biases (T5 and Switch: no).
        scale: what logits are multiplied by; None = 1 / sqrt(head_dim). T5 and Switch use 1 and leave the rest to the
            initialisation, as `init_weights` then does.

    Raises:
        ValueError: if `heads` does not divide `dim` and there is no `head_dim`.

    Source: arXiv:1706.03762 section 3.2.
    """

    inputs: ClassVar[Mapping[str, int]] = {"qkv": 3}
    qkv: FusedLinear
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv.weight": ("part", "heads", "embed"),
        "qkv.bias": ("part", "heads"),
        "out.weight": ("embed", "heads"),
        "out.bias": ("embed",),
    }

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: Float[B, Q, D].
            plan: who sees whom.
            cache: earlier keys and values; the new ones are added to it.
        """
        # The number of heads is taken from the weights: in tensor parallelism a process holds some of them.
        parts = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = parts.unbind(2)
        if plan.rotation is not None:
            query, key = plan.rotation.apply(query), plan.rotation.apply(key)
        if cache is not None:
            key, value = cache.append(parts[:, :, 1:] if plan.rotation is None else torch.stack((key, value), 2))
        else:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        return self.out(self._mix(query.transpose(1, 2), key, value, plan.mask, is_causal=plan.is_causal))


class CrossAttention(_Attention):
    """Multi-head attention of a sequence over a memory; keys and values come from one product.

    The sequence may have k times the memory's rows (k beams of one sentence, side by side): they share the keys and
    values of their sentence, which are neither repeated nor computed twice.

    Its arguments are those of `SelfAttention`; sequence and memory are both of width D.

    Source: arXiv:1706.03762 section 3.2.3.
    """

    inputs: ClassVar[Mapping[str, int]] = {"q": 1, "kv": 2}
    q: nn.Linear
    kv: FusedLinear
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "q.weight": ("heads", "embed"),
        "q.bias": ("heads",),
        "kv.weight": ("part", "heads", "embed"),
        "kv.bias": ("part", "heads"),
        "out.weight": ("embed", "heads"),
        "out.bias": ("embed",),
    }

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend.

        Args:
            x: Float[k*B, Q, D].
            memory: Float[B, S, D].
            mask: Bool[B, 1, 1, S], True = visible; None = all.
            cache: holds the memory's keys and values from the second call on.
        """
        rows, length = x.shape[:2]
        sentences = memory.shape[0]
        if cache is not None and cache.memory is not None:
            key, value = cache.memory
        else:
            pair = self.kv(memory).unflatten(-1, (-1, self.head_dim))
            key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
            if cache is not None:
                # As few queries read them: channels of a key lie apart, places side by side.
                key, value = key.transpose(2, 3).contiguous().transpose(2, 3), value.contiguous()
                if mask is not None and few_queries.suits(x[:, None, :1]):
                    cache.memory_mask, value = few_queries.added_mask(mask, key.shape[1], value)
                cache.memory = key, value
        # Nothing here depends on order, so the queries of all beams of a sentence are simply more queries.
        queries = rows * length // max(sentences, 1)
        query = self.q(x).unflatten(-1, (-1, self.head_dim))
        query = query.reshape(sentences, queries, *query.shape[2:]).transpose(1, 2)
        if cache is not None and cache.memory_mask is not None and few_queries.suits(query):
            mask = cache.memory_mask
        mixed = self._mix(query, key, value, mask)
        return self.out(mixed.view(rows, length, mixed.shape[2]))
