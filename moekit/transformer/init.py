"""How weights start, for every transformer of this package, in one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.experts.base import truncated_normal_
from moekit.transformer.attention import CrossAttention, SelfAttention
from moekit.transformer.embedding import TokenEmbedding
from moekit.transformer.feed_forward import GLU, MLP
from moekit.transformer.positions import RelativePositions
from moekit.transformer.projection import FusedLinear
from moekit.transformer.stack import Stack


@torch.no_grad()
def init_weights(model: nn.Module, *, scale: float = 1.0) -> None:
    """Draw the weights of attention, dense feed-forwards, embeddings and position tables anew.

    - Embeddings: normal, std 1 / sqrt(D) or 1 (see `TokenEmbedding`), so that vectors enter with unit variance.
    - Matrices that read the residual stream (q, k, v, in): truncated normal, std sqrt(scale / fan_in).
    - Matrices that write to it (out): the same, divided by sqrt(number of residual branches of the stack), so that
      the stream's variance at the end does not grow with depth.
    - Where attention logits are multiplied by a scale of yours, queries are drawn smaller or larger, so that logits
      start as they do with 1 / sqrt(head_dim).
    - T5's relative bias: normal, std 1 / sqrt(D). Biases zero. Norms start as the identity.
    - Dense feed-forwards outside of stacks: both matrices as those that read.
    - Routers, experts and modules of yours initialise themselves and are left alone.

    Does nothing to tensors on the meta device; call it after they have been given memory, together with the
    `reset_parameters` of routers and experts: `materialize` does both.

    Args:
        model: any module that contains transformers of this package.
        scale: variance scale; arXiv:2101.03961 section 2.4 uses 0.1 for its sparse models.

    Source: depth scaling of the output matrices: GPT-2. Differs: Switch scales every matrix by 0.1 instead.
    """
    for module in model.modules():
        if isinstance(module, TokenEmbedding) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=module.std)
    inside: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, Stack):
            _init_stack(stack, scale)
            inside.update(stack.modules())
    for module in model.modules():
        if isinstance(module, MLP | GLU) and module not in inside:
            _draw(module.w_in, scale)
            _draw(module.w_out, scale)


def _init_stack(stack: Stack, scale: float) -> None:
    branches = sum(block.num_branches for block in stack.blocks)
    for module in stack.modules():
        if isinstance(module, SelfAttention):
            _draw(module.qkv, scale)
            _rescale(module.qkv.weight[0], module)
            _draw(module.out, scale / branches)
        elif isinstance(module, CrossAttention):
            _draw(module.q, scale)
            _rescale(module.q.weight, module)
            _draw(module.kv, scale)
            _draw(module.out, scale / branches)
        elif isinstance(module, MLP | GLU):
            _draw(module.w_in, scale)
            _draw(module.w_out, scale / branches)
        elif isinstance(module, RelativePositions) and stack.blocks and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=stack.blocks[0].self_attention.qkv.in_features ** -0.5)


def _draw(linear: nn.Linear | FusedLinear, scale: float) -> None:
    truncated_normal_(linear.weight, linear.in_features, scale)
    if linear.bias is not None and not linear.bias.is_meta:
        nn.init.zeros_(linear.bias)


def _rescale(queries: Tensor, attention: SelfAttention | CrossAttention) -> None:
    if attention.scale is not None and not queries.is_meta:
        queries.mul_(attention.head_dim**-0.5 / attention.scale)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a model built on the meta device memory on `device` and draw all its weights."""
    model.to_empty(device=device)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    init_weights(model)
