"""The top-k router's arithmetic on a GPU: softmax, choice, places in the queues, and what losses and logs sum.

One kernel reads the logits, once. It writes each token's k best experts, their probabilities and the token's logsumexp,
and for each block of tokens how often each expert was chosen and the sums of what is averaged over tokens. A cumulative
sum over blocks says how many wait before a block, and a second kernel, which reads the choices alone, finds the places.
Backward is one kernel: it makes the probabilities anew from logits and logsumexp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.functional.assignment import queue_positions
from moekit.functional.means import masked_mean
from moekit.kernels.first_order import refuse_second_order
from moekit.kernels.gpu.language import ceil_div, jit, launch, power_of_two, tl
from moekit.kernels.gpu.tiles import pointer

MOST_EXPERTS = 4096
"""A program holds this many logits: those of one token at least."""


class TopK(NamedTuple):
    """What a top-k router finds in logits.

    Attributes:
        expert: Int64[K, T], the K best experts of each token; of equals the first.
        weight: Float32[K, T], their probabilities, with gradient.
        position: Int64[K, T], place in the expert's queue, all first choices before all second; -1 at padding.
        counts: Int64[K, E], real tokens that made an expert their k-th choice.
        mean_probs: Float32[E], mean probability over real tokens, with gradient.
        router_z: Float32 scalar, mean over real tokens of logsumexp squared, with gradient.
        entropy: Float32 scalar, mean over real tokens (nats).
        logsumexp: Float32 scalar, mean over real tokens.
    """

    expert: Tensor
    weight: Tensor
    position: Tensor
    counts: Tensor
    mean_probs: Tensor
    router_z: Tensor
    entropy: Tensor
    logsumexp: Tensor


def topk_reference(logits: Tensor, k: int, mask: Tensor | None = None) -> TopK:
    """The obvious form of `topk`, by autograd."""
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], 0.0)
    probs, lse = logits.softmax(-1), logits.logsumexp(-1)
    order = probs.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    expert = order.t().contiguous()
    real = torch.ones_like(lse, dtype=torch.bool) if mask is None else mask
    position = queue_positions(expert.flatten(), real.repeat(k), logits.shape[1]).view(k, -1)
    chosen = torch.nn.functional.one_hot(expert, logits.shape[1]) * real[:, None]
    entropy = torch.special.entr(probs.detach()).sum(-1)
    return TopK(
        expert, probs.gather(1, order).t(), position, chosen.sum(1), masked_mean(probs, mask),
        masked_mean(lse.square(), mask), masked_mean(entropy, mask), masked_mean(lse.detach(), mask),
    )  # fmt: skip


def topk(logits: Tensor, k: int, mask: Tensor | None = None) -> TopK:
    """See `TopK`.

    Args:
        logits: Float32[T, E].
        k: choices of a token, at most E.
        mask: Bool[T], real tokens. Logits of padding may hold anything; their gradient is zero.
    """
    expert, position, counts, entropy, logsumexp, weight, mean_probs, router_z = _TopK.apply(logits, k, mask)
    return TopK(expert, weight, position, counts, mean_probs, router_z, entropy, logsumexp)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        (t, e), device = logits.shape, logits.device
        e2 = power_of_two(e)
        height = max(1, min(128, MOST_EXPERTS // e2))
        blocks = ceil_div(t, height)
        expert = torch.empty(k, t, dtype=torch.int64, device=device)
        weight = torch.empty(k, t, dtype=torch.float32, device=device)
        lse = torch.empty(t, dtype=torch.float32, device=device)
        chosen = torch.empty(k, blocks, e, dtype=torch.int64, device=device)
        sums = torch.empty(blocks, e + 3, dtype=torch.float32, device=device)
        real = None if mask is None else mask.contiguous().view(torch.uint8)
        launch(
            _choose_kernel, (blocks,), logits, pointer(real, lse), expert, weight, lse, chosen, sums, t, e, blocks,
            K=k, MASKED=mask is not None, BT=height, E2=e2,
        )  # fmt: skip
        before = chosen.view(-1, e).cumsum(0).view_as(chosen) - chosen
        position = torch.empty_like(expert)
        launch(
            _place_kernel, (blocks, k), expert, pointer(real, lse), position, before, t, e, blocks,
            MASKED=mask is not None, BT=height, E2=e2,
        )  # fmt: skip
        tokens = lse.new_full((), t) if mask is None else mask.sum().to(torch.float32)
        tokens = tokens.clamp_min(1.0)
        means = sums.sum(0) / tokens
        ctx.save_for_backward(logits, lse, expert, real, tokens)
        mean_probs, router_z, entropy, logsumexp = means[:e], means[e], means[e + 1], means[e + 2]
        counts = chosen.sum(1)
        ctx.mark_non_differentiable(expert, position, counts, entropy, logsumexp)
        ctx.set_materialize_grads(True)
        return expert, position, counts, entropy, logsumexp, weight, mean_probs, router_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_order("Triton's top-k router", 'backend="torch"')
        logits, lse, expert, real, tokens = ctx.saved_tensors
        d_weight, d_mean, d_z = grads[-3:]
        (t, e), k = logits.shape, expert.shape[0]
        e2 = power_of_two(e)
        height = max(1, min(128, MOST_EXPERTS // e2))
        out = torch.empty_like(logits)
        launch(
            _scores_grad_kernel, (ceil_div(t, height),), logits, lse, expert, pointer(real, lse), d_weight.contiguous(),
            (d_mean / tokens).contiguous(), (d_z / tokens).contiguous(), out, t, e,
            K=k, MASKED=real is not None, BT=height, E2=e2,
        )  # fmt: skip
        return out, None, None


@jit
def _choose_kernel(
    logits, mask, expert, weight, lse, chosen, sums, tokens, experts, blocks,
    K: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t, e = block * BT + tl.arange(0, BT), tl.arange(0, E2)
    here, there = t < tokens, e < experts
    real = here
    if MASKED:
        real = here & (tl.load(mask + t, mask=here, other=0) != 0)
    at = t.to(tl.int64)[:, None] * experts + e[None, :]
    # Padding reads as zeros, so that nothing it holds goes on.
    x = tl.load(logits + at, mask=real[:, None] & there[None, :], other=0.0)
    x = tl.where(there[None, :], x, float("-inf"))
    top = tl.max(x, 1)
    powers = tl.exp(x - top[:, None])
    total = tl.sum(powers, 1)
    z = top + tl.log(total)
    probs = powers / total[:, None]
    tl.store(lse + t, z, mask=here)
    left = tl.where(there[None, :], probs, -2.0)
    for k in tl.static_range(K):
        best = tl.minimum(tl.argmax(left, 1), experts - 1)  # of equals the first; among NaN it may name any place
        hit = e[None, :] == best[:, None]
        tl.store(expert + k * tokens + t, best.to(tl.int64), mask=here)
        tl.store(weight + k * tokens + t, tl.sum(tl.where(hit, probs, 0.0), 1), mask=here)
        number = tl.sum((hit & real[:, None]).to(tl.int32), 0)
        tl.store(chosen + (k * blocks + block) * experts + e, number.to(tl.int64), mask=there)
        left = tl.where(hit, -1.0, left)
    one = real.to(tl.float32)
    row = sums + block * (experts + 3)
    tl.store(row + e, tl.sum(probs * one[:, None], 0), mask=there)
    # -log p = z - x; where p is 0, x may be minus infinity.
    bits = probs * (z[:, None] - tl.where(probs > 0, x, z[:, None]))
    tl.store(row + experts, tl.sum(z * z * one, 0))
    tl.store(row + experts + 1, tl.sum(tl.sum(bits, 1) * one, 0))
    tl.store(row + experts + 2, tl.sum(z * one, 0))


@jit
def _place_kernel(
    expert, mask, position, before, tokens, experts, blocks,
    MASKED: tl.constexpr, BT: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    block, k = tl.program_id(0), tl.program_id(1)
    t, e = block * BT + tl.arange(0, BT), tl.arange(0, E2)
    here = t < tokens
    real = here
    if MASKED:
        real = here & (tl.load(mask + t, mask=here, other=0) != 0)
    mine = tl.load(expert + k * tokens + t, mask=here, other=0)
    hit = ((e[None, :] == mine[:, None]) & real[:, None]).to(tl.int32)
    waiting = tl.load(before + (k * blocks + block) * experts + e, mask=e < experts, other=0).to(tl.int32)
    place = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + waiting[None, :]), 1)
    tl.store(position + k * tokens + t, tl.where(real, place, -1).to(tl.int64), mask=here)


@jit
def _scores_grad_kernel(
    logits, lse, expert, mask, d_weight, d_mean, d_z, out, tokens, experts,
    K: tl.constexpr, MASKED: tl.constexpr, BT: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, E2)
    here, there = t < tokens, e < experts
    real = here
    if MASKED:
        real = here & (tl.load(mask + t, mask=here, other=0) != 0)
    both = here[:, None] & there[None, :]
    at = t.to(tl.int64)[:, None] * experts + e[None, :]
    x = tl.load(logits + at, mask=real[:, None] & there[None, :], other=0.0)
    z = tl.load(lse + t, mask=here, other=0.0)
    probs = tl.where(there[None, :], tl.exp(x - z[:, None]), 0.0)
    d_probs = tl.zeros((BT, E2), dtype=tl.float32) + tl.load(d_mean + e, mask=there, other=0.0)[None, :]
    for k in tl.static_range(K):
        chosen = tl.load(expert + k * tokens + t, mask=here, other=0)
        grad = tl.load(d_weight + k * tokens + t, mask=here, other=0.0)
        d_probs += tl.where(e[None, :] == chosen[:, None], grad[:, None], 0.0)
    grads = probs * (d_probs - tl.sum(d_probs * probs, 1)[:, None] + 2.0 * tl.load(d_z) * z[:, None])
    tl.store(out + at, tl.where(real[:, None], grads, 0.0), mask=both)
