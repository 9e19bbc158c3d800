"""Attention against torch's own module and against loops; masks, plans and caches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moekit.transformer import (
    AttentionPlan,
    CrossAttention,
    Positions,
    RelativePositions,
    RotaryPositions,
    SelfAttention,
)
from moekit.transformer.attention import plan_attention
from moekit.transformer.cache import DecoderCache, LayerCache

B, S, D, H = 3, 6, 16, 4


def torch_twin(attention: SelfAttention) -> nn.MultiheadAttention:
    twin = nn.MultiheadAttention(D, H, bias=attention.qkv.bias is not None, batch_first=True).double()
    with torch.no_grad():
        twin.in_proj_weight.copy_(attention.qkv.weight.flatten(0, 1))
        twin.out_proj.weight.copy_(attention.out.weight)
        if attention.qkv.bias is not None:
            twin.in_proj_bias.copy_(attention.qkv.bias.flatten())
            twin.out_proj.bias.copy_(attention.out.bias)
    return twin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torch(bias: bool, causal: bool) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(D, H, bias=bias).double()
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(S) < torch.tensor([6, 3, 4])[:, None]
    plan = plan_attention(x, Positions(), D // H, offset=0, causal=causal, key_mask=None if causal else mask)
    assert plan.is_causal == causal
    hidden = attention(x, plan)
    twin, y = torch_twin(attention), x.detach().clone().requires_grad_()
    expected, _ = twin(
        y,
        y,
        y,
        key_padding_mask=None if causal else ~mask,
        attn_mask=nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64) if causal else None,
        is_causal=causal,
        need_weights=False,
    )
    torch.testing.assert_close(hidden, expected)
    hidden.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(attention.qkv.weight.grad.flatten(0, 1), twin.in_proj_weight.grad)


def loop(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None = None) -> Tensor:
    """One head at a time, one query at a time. query [B Q H C], key [B K H C], visible [B Q K], bias [H Q K]."""
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            for q in range(query.shape[1]):
                weights = {}
                for k in range(key.shape[1]):
                    if visible[b, q, k]:
                        logit = float(query[b, q, h] @ key[b, k, h]) / math.sqrt(query.shape[-1])
                        weights[k] = math.exp(logit + (0.0 if bias is None else float(bias[h, q, k])))
                for k, weight in weights.items():
                    out[b, q, h] += weight / sum(weights.values()) * value[b, k, h]
    return out


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [None, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_relative_bias_rotation_and_masks_against_a_loop(causal: bool, head_dim: int | None) -> None:
    torch.manual_seed(1)
    attention = SelfAttention(D, H, head_dim=head_dim).double()
    channels = head_dim or D // H
    x = torch.randn(B, S, D, dtype=torch.float64)
    mask = torch.arange(S) < torch.tensor([6, 2, 5])[:, None]
    visible = torch.ones(B, S, S, dtype=torch.bool) if causal else mask[:, None, :].expand(B, S, S)
    if causal:
        visible = visible & (torch.arange(S) <= torch.arange(S)[:, None])
    relative = RelativePositions(H, num_buckets=4, max_distance=3).double()
    relative.weight.normal_()
    for positions in (relative, RotaryPositions()):
        plan = plan_attention(x, positions, channels, offset=0, causal=causal, key_mask=None if causal else mask)
        query, key, value = attention.qkv(x).unflatten(-1, (H, channels)).unbind(2)
        place = torch.arange(S)
        rotation, bias = positions.rotation(place, channels), positions.bias(place, place, causal=causal)
        if rotation is not None:
            query, key = rotation.apply(query), rotation.apply(key)
        expected = attention.out(loop(query, key, value, visible, bias).flatten(2))
        torch.testing.assert_close(attention(x, plan), expected)


@torch.no_grad()
def test_cross_attention_against_a_loop_and_shared_by_beams() -> None:
    torch.manual_seed(2)
    attention = CrossAttention(D, H).double()
    memory = torch.randn(2, 5, D, dtype=torch.float64)
    x = torch.randn(6, 4, D, dtype=torch.float64)  # three beams of each of two sentences
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    query = attention.q(x).view(6, 4, H, D // H)
    key, value = attention.kv(memory).view(2, 5, 2, H, D // H).unbind(2)
    visible = mask[:, None, :].expand(2, 4, 5).repeat_interleave(3, 0)
    mixed = loop(query, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0), visible)
    expected = attention.out(mixed.flatten(2))
    torch.testing.assert_close(attention(x, memory, mask[:, None, None, :]), expected)
    cache = LayerCache()
    for _ in range(2):
        torch.testing.assert_close(attention(x, memory, mask[:, None, None, :], cache), expected)
    # The second call read the cache: a changed memory goes unnoticed.
    torch.testing.assert_close(attention(x, memory + 1, mask[:, None, None, :], cache), expected)
    cache.select_memory(torch.tensor([1]))
    torch.testing.assert_close(attention(x[3:], memory[1:], mask[1:, None, None, :], cache), expected[3:])


def test_a_row_without_a_real_token_gives_zeros_and_no_nan() -> None:
    torch.manual_seed(3)
    attention = SelfAttention(D, H)
    x = torch.randn(2, S, D, requires_grad=True)
    mask = torch.tensor([[True] * S, [False] * S])
    for positions in (Positions(), RelativePositions(H)):
        plan = plan_attention(x, positions, D // H, offset=0, causal=False, key_mask=mask)
        hidden = attention(x, plan)
        assert (hidden[1] == 0).all()
        hidden.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(4)
    attention, x = SelfAttention(D, H, dropout=0.5), torch.randn(B, S, D)
    assert not torch.equal(attention(x, AttentionPlan()), attention(x, AttentionPlan()))
    attention.eval()
    assert torch.equal(attention(x, AttentionPlan()), attention(x, AttentionPlan()))
    cross = CrossAttention(D, H, dropout=0.5)
    assert not torch.equal(cross(x, x), cross(x, x))
    cross.eval()
    assert torch.equal(cross(x, x), cross(x, x))


@torch.no_grad()
@pytest.mark.parametrize(
    "positions", [Positions(), RelativePositions(H), RotaryPositions()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("pieces", [[1] * 6, [3, 3], [1, 4, 1], [6]], ids=str)
def test_cached_pieces_equal_the_whole(positions: Positions, pieces: list[int]) -> None:
    torch.manual_seed(5)
    attention, x = SelfAttention(D, H).double(), torch.randn(B, S, D, dtype=torch.float64)
    positions = positions.double()
    for weight in positions.parameters():
        weight.normal_()
    whole = attention(x, plan_attention(x, positions, D // H, offset=0, causal=True))
    cache, done, out = LayerCache(), 0, []
    for piece in pieces:
        new = x[:, done : done + piece]
        out.append(attention(new, plan_attention(new, positions, D // H, offset=done, causal=True), cache))
        done += piece
    torch.testing.assert_close(torch.cat(out, 1), whole)


def test_cache_grows_reorders_and_multiplies_rows() -> None:
    torch.manual_seed(6)
    cache, all_keys, all_values = LayerCache(), torch.randn(2, 100, H, 3), torch.randn(2, 100, H, 3)
    keys = values = torch.empty(0)
    for step in range(70):
        keys, values = cache.append(torch.stack((all_keys, all_values), 2)[:, step : step + 1])
    torch.testing.assert_close(keys, all_keys[:, :70].transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(values, all_values[:, :70].transpose(1, 2), rtol=0, atol=0)
    rows = torch.tensor([1, 0, 1])
    cache.reorder(rows)
    keys, values = cache.append(torch.stack((all_keys, all_values), 2)[rows, 70:])
    torch.testing.assert_close(keys, all_keys[rows].transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(values, all_values[rows].transpose(1, 2), rtol=0, atol=0)


@torch.no_grad()
def test_a_cache_knows_the_bias_of_each_step() -> None:
    positions, cache, x = RelativePositions(H), DecoderCache(1), torch.randn(2, 1, D)
    positions.weight.normal_()
    for step in range(70):
        plans = [plan_attention(x, positions, D // H, offset=step, causal=True, cache=known) for known in (cache, None)]
        assert plans[0].mask is not None
        torch.testing.assert_close(plans[0].mask, plans[1].mask, rtol=0, atol=0)
        cache.advance(torch.zeros(2, 1, dtype=torch.int64))
    assert DecoderCache(1).bias(Positions(), x) is None


def test_a_new_cache_may_be_reordered() -> None:
    cache = DecoderCache(2)
    cache.reorder(torch.tensor([0, 0]))
    cache.select_memory(torch.tensor([0]))
    assert cache.length == 0
    assert cache.last_ids is None


def test_the_fast_causal_path_is_taken_and_one_step_needs_no_mask() -> None:
    x = torch.randn(B, S, D)
    plan = plan_attention(x, RotaryPositions(), 4, offset=0, causal=True)
    assert plan.is_causal
    assert plan.mask is None
    step = plan_attention(x[:, :1], RotaryPositions(), 4, offset=9, causal=True)
    assert not step.is_causal
    assert step.mask is None
    late = plan_attention(x[:, :2], Positions(), 4, offset=3, causal=True)
    assert late.mask is not None
    assert late.mask.tolist() == [[True] * 4 + [False], [True] * 5]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="dim must be divisible by heads"):
        SelfAttention(10, 4)
    with pytest.raises(ValueError, match="dim must be divisible by heads"):
        CrossAttention(10, 4)
    assert SelfAttention(10, 4, head_dim=3).out.in_features == 12
