"""What the parts of a transformer compute, and what they keep for backward, by formula.

T = tokens, D = width, I = heads * head_dim, F = hidden channels, E = experts, A = assignments, R = rows of experts.
A product of [T, a] with [a, b] counts 2 T a b floating-point operations. Attention keeps no probabilities: it is
assumed to run in a fused kernel (flash attention), which computes them again in backward. On a CPU that is not so of
learned relative positions, whose attention keeps T L numbers for each head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from moekit.experts import Experts, GroupedGLU, GroupedMLP
from moekit.layer import MoELayer
from moekit.parallel.layout import Precision, Training
from moekit.soft_moe import SoftMoELayer
from moekit.transformer.attention import CrossAttention, SelfAttention
from moekit.transformer.block import Block
from moekit.transformer.feed_forward import GLU, MLP


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations of one forward, and numbers kept for backward, of one micro-batch on one device.

    Attributes:
        flops: floating-point operations.
        stream: numbers in the type of the residual stream.
        compute: numbers in the type of products.
        sliced: the same, divided among tensor-parallel devices.
        wide: float32 numbers.
        masks: bytes of dropout masks.
        measured: bytes kept, as torch counts them, of a model whose parts are measured instead.
        frozen: operations that backward leaves out, for weights that are not trained.
        sent: numbers that a device sends to experts (tokens times width), one way.
        summed_forward: numbers that tensor-parallel partners sum in forward: what divided layers give.
        summed_backward: the same in backward: gradients of what divided layers read.
    """

    flops: float = 0.0
    stream: float = 0.0
    compute: float = 0.0
    sliced: float = 0.0
    wide: float = 0.0
    masks: float = 0.0
    measured: float = 0.0
    frozen: float = 0.0
    sent: float = 0.0
    summed_forward: float = 0.0
    summed_backward: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def kept_bytes(self, precision: Precision, tensor_parallel_size: int = 1) -> float:
        """Bytes kept for backward."""
        return (
            self.stream * precision.stream
            + (self.compute + self.sliced / tensor_parallel_size) * precision.compute
            + self.wide * 4
            + self.masks
            + self.measured
        )


def block_cost(block: Block, causal: bool, training: Training) -> Cost:
    """Cost of a block: attention, cross-attention, feed-forward, the extra one, their norms and dropout."""
    length = training.target_length if causal else training.source_length
    d, t, branches = block.self_attention.qkv.in_features, training.sequences * length, block.num_branches
    # A norm keeps its input, and each token's mean and deviation.
    total = Cost(stream=branches * t * d, wide=branches * 2 * t, masks=branches * t * d * bool(block.dropout))
    total = total + attention_cost(block.self_attention, training, length, length)
    if block.cross_attention is not None:
        total = total + attention_cost(block.cross_attention, training, length, training.source_length)
    if block.extra is not None:
        total = total + feed_forward_cost(block.extra, t, training.sequences, training.numbers)
    return total + feed_forward_cost(block.feed_forward, t, training.sequences, training.numbers)


def attention_cost(
    attention: SelfAttention | CrossAttention, training: Training, length: int, memory_length: int
) -> Cost:
    """Four projections, 4 (T + M) D I, and two products of every token with all L of its memory, 4 T L I.

    The memory of M tokens is what keys and values are made of: the sequence itself (causal or not), or the encoder's.
    """
    t, m = training.sequences * length, training.sequences * memory_length
    crosses = isinstance(attention, CrossAttention)
    d = (attention.q if isinstance(attention, CrossAttention) else attention.qkv).in_features
    inner = attention.heads * attention.head_dim
    # All layers read one memory; where it is float32 and products are not, each layer makes a copy of its own.
    copied = crosses and training.numbers.stream != training.numbers.compute
    return Cost(
        flops=4 * (t + m) * d * inner + 4 * t * memory_length * inner,
        compute=t * d + m * d * copied,  # the input of the projections
        sliced=2 * (t + m) * inner,  # queries, keys, values, result
        wide=t * attention.heads,  # the logarithm of each softmax's denominator
        summed_forward=t * d,
        summed_backward=(t + m * crosses) * d,
    )


def feed_forward_cost(module: nn.Module, t: int, sequences: int, precision: Precision) -> Cost:
    """Cost of any feed-forward on T tokens in so many sequences."""
    if isinstance(module, MoELayer):
        return moe_cost(module, t, sequences, precision)
    if isinstance(module, SoftMoELayer):
        return soft_moe_cost(module, t, sequences)
    if isinstance(module, MLP | GLU):
        return _hidden_cost(module, t, module.w_in.in_features, module.w_out.in_features)
    return linear_cost(module, t)


def linear_cost(module: nn.Module, t: int) -> Cost:
    """Cost of the `nn.Linear`s in an unknown module, each applied to T tokens: they keep their inputs."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return Cost(
        flops=sum(2.0 * t * m.in_features * m.out_features for m in linears),
        compute=sum(float(t * m.in_features) for m in linears),
    )


def _hidden_cost(module: Any, rows: float, d: int, f: int) -> Cost:
    """Two matrices of D x F for each row, three of a gated unit."""
    gated, dropped = isinstance(module, GLU | GroupedGLU), int(module.dropout > 0)
    # A ReLU needs no more than its result, which is also what follows needs; others need what they read too. A gated
    # unit also keeps up and the product. Gate and up of a GLU are one tensor, so that keeping the one keeps the other.
    activated = 1 if module.activation == "relu" and not isinstance(module, GLU) else 2
    return Cost(
        flops=2 * rows * (3 if gated else 2) * d * f,
        compute=rows * d,
        sliced=rows * (activated + dropped + 2 * gated) * f,
        masks=rows * dropped * f,
        summed_forward=rows * d,
        summed_backward=rows * d,
    )


def moe_cost(layer: MoELayer, t: int, sequences: int, precision: Precision) -> Cost:
    """Cost of a Mixture of Experts whose load is balanced: A = k T assignments, R rows computed by experts.

    With a capacity, R = E C slots are computed, filled or not; without, R = A. Where A changes in training, memory is
    that of the step that has most, and operations and traffic are those of the router's `choices_per_token`.
    """
    router: Any = layer.router
    bank = layer.experts
    e, d = router.num_experts, bank.dim
    capacity = getattr(router, "capacity", None)
    slots = None if capacity is None else capacity.slots(t, e, getattr(router, "k", 1), training=True)
    rows = router.choices_per_token * t if slots is None else e * slots
    most = router.most_choices_per_token * t
    work, held = experts_cost(bank, rows), experts_cost(bank, most if slots is None else rows)
    # The router keeps its float32 input (which is also the experts' source; with jitter twice), logits, and
    # probabilities twice.
    wide = t * d * (2 if getattr(router, "jitter", 0.0) else 1) + 3 * t * e
    # The weighted sum keeps every result in float32, before and after it is weighed.
    total = Cost(flops=2 * t * router.multiplications_per_token, wide=wide + 2 * most * d, sent=rows * d)
    total = total + replace(work, compute=held.compute, sliced=held.sliced, masks=held.masks)
    if layer.shared is not None:
        total = total + feed_forward_cost(layer.shared, t, sequences, precision)
        if precision.compute == 4:  # the branch reads the very tensor that the router keeps
            total = total + Cost(compute=-t * d)
    return total


def soft_moe_cost(layer: SoftMoELayer, t: int, sequences: int) -> Cost:
    """Scores of T tokens for the slots of their sequence, two mixtures by them, and experts on all slots."""
    d, slots = layer.dim, layer.num_experts * layer.slots
    # In float32: tokens as they are and normalised, five tables of scores on the way to both mixtures, and what
    # experts return.
    kept = 2 * t * d + 5 * t * slots + slots * d + sequences * slots * d
    return experts_cost(layer.experts, sequences * slots) + Cost(flops=3 * 2.0 * t * slots * d, wide=kept)


def experts_cost(bank: Experts, rows: float) -> Cost:
    """Two (gated: three) matrices for each row; another bank: all of an expert's matrices, which keep their inputs."""
    if isinstance(bank, GroupedMLP | GroupedGLU):
        return _hidden_cost(bank, rows, bank.dim, bank.hidden_dim)
    matrices = list(_matrices(bank))
    return Cost(
        flops=sum(2.0 * rows * shape.numel() for shape in matrices),
        compute=sum(float(rows * shape[:-1].numel()) for shape in matrices),
    )


def _matrices(bank: nn.Module) -> Iterator[torch.Size]:
    """Shapes of one expert's matrices, [a, b], or [L, a, b] of an expert that is a stack of L blocks."""
    for owner in bank.modules():
        axes: Mapping[str, tuple[str, ...]] = getattr(owner, "axes", {})
        for name, parameter in owner.named_parameters(recurse=False):
            inner = [axis for axis in axes.get(name, ("",) * (parameter.dim() - 1)) if axis not in ("expert", "layer")]
            if len(inner) == 2:
                yield parameter.shape[1:]
