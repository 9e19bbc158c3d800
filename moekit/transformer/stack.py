"""A stack of blocks with shared positions and a final norm: the encoder, or the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.component import Component
from moekit.functional.activation import Activation
from moekit.functional.dropout import dropout
from moekit.routing import Routing
from moekit.transformer.attention import CrossAttention, SelfAttention, plan_attention
from moekit.transformer.block import Block
from moekit.transformer.cache import DecoderCache
from moekit.transformer.context import routing_context
from moekit.transformer.feed_forward import MLP, FeedForwardFactory, Side, SparseDense
from moekit.transformer.norms import LayerNorm
from moekit.transformer.output import StackOutput
from moekit.transformer.padding import check_right_padded, count_real
from moekit.transformer.positions import Positions, RelativePositions


class Stack(Component):
    """Blocks one after another, then a norm. Masks, positions and routing context are made once for all of them.

    Args:
        blocks: the layers, first to last.
        positions: the idea of order.
        norm: applied after the last block.
        causal: whether tokens are kept from seeing later ones. Such a stack takes padding on the right only, where
            causality hides it anyway, and needs no padding mask in attention.
        dropout: probability on the embeddings.
        final_dropout: probability on what the norm gives (T5, Switch).
        checkpoint: forget activations inside blocks and compute them again in backward: less memory, same numbers.
        pad_id: stands for "the token before the first" in routing contexts.
        init_scale: variance scale of first weights: see `moekit.transformer.init_weights`.
        init_by_depth: whether matrices that write to the residual stream are divided by the root of the number of
            branches.

    Raises:
        ValueError: if a feed-forward of a causal stack may look at later tokens.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        positions: Positions,
        norm: nn.Module,
        causal: bool,
        dropout: float = 0.0,
        final_dropout: float = 0.0,
        checkpoint: bool = False,
        pad_id: int = 0,
        init_scale: float = 1.0,
        init_by_depth: bool = True,
    ) -> None:
        super().__init__()
        self.init_scale, self.init_by_depth = init_scale, init_by_depth
        self.layers = nn.ModuleList(blocks)
        self.positions, self.norm = positions, norm
        self.causal, self.dropout, self.checkpoint, self.pad_id = causal, dropout, checkpoint, pad_id
        self.final_dropout = final_dropout
        if causal:
            for block in blocks:
                if block.is_routed:
                    block.feed_forward.check_causal()  # type: ignore[operator]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers, first to last, by their type."""
        return tuple(cast(Block, layer) for layer in self.layers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Numbers of the sparse layers, in the order of `StackOutput.routings`."""
        return tuple(i for i, block in enumerate(self.blocks) if block.is_routed)

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        language: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> StackOutput:
        """Run the blocks.

        Args:
            x: Float[B, S, D], embedded tokens.
            ids: Int64[B, S], the tokens, for routers.
            mask: Bool[B, S], True = a real token. None = all are.
            language: Int64[B], for routers.
            memory: Float[B', S', D] for cross-attention; B is a multiple of B'.
            memory_mask: Bool[B', S'].
            cache: keys and values of earlier tokens; changed in place.

        Raises:
            ValueError: on a CPU, if padding stands where it would be seen: before a token of a causal stack, in a
                cache, or between tokens where positions are a bias by distance.
        """
        offset = 0 if cache is None else cache.length
        if self.causal:
            check_right_padded(mask, cached=cache is not None)
        if self.causal or mask is None:
            place = torch.arange(offset, offset + x.shape[1], device=x.device)
        else:
            place = count_real(mask)
        x = dropout(self.positions.embed(x, place), self.dropout, training=self.training)
        blocks = self.blocks
        plan = plan_attention(
            x,
            self.positions,
            blocks[0].self_attention.head_dim if blocks else 2,
            offset=offset,
            causal=self.causal,
            key_mask=None if self.causal else mask,
            cache=cache,
        )
        context = None
        if any(block.is_routed for block in blocks):
            context = routing_context(ids, mask, language, pad_id=self.pad_id, cache=cache)
        keys = None if memory_mask is None else memory_mask[:, None, None, :]
        routings: list[Routing] = []
        for number, block in enumerate(blocks):
            past = None if cache is None else cache.layers[number]
            inputs = (x, plan, context, memory, keys, past)
            if self.checkpoint and past is None and torch.is_grad_enabled():
                output = checkpoint(block, *inputs, use_reentrant=False)
            else:
                output = block(*inputs)
            x = output.hidden
            if output.routing is not None:
                routings.append(output.routing)
                if context is not None and output.routing.logits is not None:
                    context = dataclasses.replace(context, previous_logits=output.routing.logits)
        if cache is not None:
            cache.advance(ids)
        x = dropout(self.norm(x), self.final_dropout, training=self.training)
        return StackOutput(x, tuple(routings))


class StackOptions(TypedDict, total=False):
    """Options of `build_stack` that every model passes on; see there."""

    feed_forward: FeedForwardFactory | None
    positions: Positions | None
    norm: Callable[[int], nn.Module]
    activation: Activation
    dropout: float
    attention_dropout: float
    attention_scale: float | None
    final_dropout: float
    head_dim: int | None
    bias: bool
    checkpoint: bool
    init_scale: float
    init_by_depth: bool


def build_stack(
    side: Side,
    layers: int,
    dim: int,
    heads: int,
    hidden_dim: int,
    *,
    cross_attention: bool = False,
    pad_id: int = 0,
    feed_forward: FeedForwardFactory | None = None,
    positions: Positions | None = None,
    norm: Callable[[int], nn.Module] = LayerNorm,
    activation: Activation = "relu",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    attention_scale: float | None = None,
    final_dropout: float = 0.0,
    head_dim: int | None = None,
    bias: bool = False,
    checkpoint: bool = False,
    init_scale: float = 1.0,
    init_by_depth: bool = True,
) -> Stack:
    """Build a uniform stack.

    Args:
        side: "encoder" (sees everything) or "decoder" (causal).
        layers: number of blocks.
        dim: D.
        heads: H.
        hidden_dim: F of the default feed-forward.
        cross_attention: whether blocks attend to a memory.
        pad_id: that of `Stack`.
        feed_forward: makes the feed-forward of each layer; None, or a factory that returns None = `MLP`.
        positions: the idea of order; None = T5's `RelativePositions`. An object with weights belongs to this stack.
        norm: makes a norm for D.
        activation: the one of the default feed-forward.
        dropout: probability on embeddings, branch outputs and the hidden activations of the default feed-forward.
        attention_dropout: probability on attention weights.
        attention_scale: scale of `SelfAttention`.
        final_dropout: that of `Stack`.
        head_dim: channels per head; None = D / H.
        bias: whether attention and the default feed-forward have biases (T5 and Switch: no).
        checkpoint: that of `Stack`.
        init_scale: that of `Stack`.
        init_by_depth: that of `Stack`.
    """
    attention = {"head_dim": head_dim, "dropout": attention_dropout, "bias": bias, "scale": attention_scale}
    blocks = []
    for number in range(layers):
        made = None if feed_forward is None else feed_forward(number, side)
        if made is None:
            made = MLP(dim, hidden_dim, activation=activation, dropout=dropout, bias=bias)
        pair = made if isinstance(made, SparseDense) else None
        num_norms = 2 + cross_attention + (pair is not None)
        blocks.append(
            Block(
                SelfAttention(dim, heads, **attention),  # type: ignore[arg-type]
                made if not isinstance(made, SparseDense) else made.sparse,
                norms=tuple(norm(dim) for _ in range(num_norms)),
                cross_attention=CrossAttention(dim, heads, **attention) if cross_attention else None,  # type: ignore[arg-type]
                dropout=dropout,
                extra=None if pair is None else pair.dense,
                extra_order="after" if pair is None else pair.order,
            )
        )
    return Stack(
        blocks,
        positions=RelativePositions(heads) if positions is None else positions,
        norm=norm(dim),
        causal=side == "decoder",
        dropout=dropout,
        final_dropout=final_dropout,
        checkpoint=checkpoint,
        pad_id=pad_id,
        init_scale=init_scale,
        init_by_depth=init_by_depth,
    )
