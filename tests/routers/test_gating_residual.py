"""MoE++'s gating residuals: a stack hands the scores of a sparse layer to the next one's router."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekit as mk
from moekit.experts import GroupedMLP, ZeroComputationExperts
from moekit.routers import GatingResidual, TopKRouter
from moekit.routing import RoutingContext
from moekit.surgery import sparse_layers
from moekit.testing import assert_close, check_router, seeded
from moekit.transformer import DecoderOnly

D, V, E = 12, 30, (6, 5, 6)


def feed_forward(layer: int, side: str) -> nn.Module:
    """Layers of 6, 5 and 6 experts, four of which compute nothing."""
    previous = None if layer == 0 else E[layer - 1]
    router = TopKRouter(D, E[layer], 2, residual=GatingResidual(E[layer], previous), init_scale=3.0)
    return mk.MoELayer(router, ZeroComputationExperts(GroupedMLP(E[layer] - 4, D, 8)))


def model(**options: Any) -> DecoderOnly:
    with seeded(0):
        made = DecoderOnly(V, D, 2, 3, 8, feed_forward=feed_forward, **options).double()
        for name, parameter in made.named_parameters():
            if "router" in name:
                nn.init.normal_(parameter)
    return made


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, V, (3, 7), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(7) < torch.tensor([7, 4, 5])[:, None]


def literal(model: DecoderOnly, ids: Tensor) -> list[list[tuple[list[int], list[float], list[float]]]]:
    """For every sparse layer and token: its two experts, their weights, all its scores. One sequence, no padding.

    The states before each router are heard by hooks; everything of the gate is written out.
    """
    seen: list[Tensor] = []
    routers = [block.feed_forward.router for block in model.decoder.blocks]
    hooks = [r.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())) for r in routers]
    model.decode(ids)
    for hook in hooks:
        hook.remove()
    layers: list[Any] = []
    for number, (router, x) in enumerate(zip(routers, seen, strict=True)):
        rows = []
        for t in range(x.shape[0]):
            scores = []
            for e in range(router.num_experts):
                score = sum(float(x[t, d] * router.weight[e, d]) for d in range(D))
                if number:
                    before = layers[-1][t][2]
                    score += sum(float(router.residual.weight[e, j]) * before[j] for j in range(len(before)))
                scores.append(score)
            total = sum(math.exp(score) for score in scores)
            best = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
            rows.append((best, [math.exp(scores[e]) / total for e in best], scores))
        layers.append(rows)
    return layers


@torch.no_grad()
def test_a_stack_against_the_formula_written_out() -> None:
    net = model().eval()
    ids, mask = batch()
    for row in range(3):
        alone = ids[row : row + 1, : int(mask[row].sum())]
        routings = net.decode(alone).routings
        for found, rows in zip(routings, literal(net, alone), strict=True):
            t = len(rows)
            assert found.logits is not None
            assert_close(found.logits, torch.tensor([scores for _, _, scores in rows], dtype=torch.float64))
            assert found.expert.view(2, t).t().tolist() == [best for best, _, _ in rows]
            weight = torch.tensor([weights for _, weights, _ in rows], dtype=torch.float64)
            torch.testing.assert_close(found.weight.view(2, t).t(), weight, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_what_is_handed_on_changes_choices() -> None:
    net = model().eval()
    with_it = net.decode(batch()[0]).routings
    for block in net.decoder.blocks[1:]:
        block.feed_forward.router.residual.weight.zero_()
    without = net.decode(batch()[0]).routings
    assert torch.equal(with_it[0].expert, without[0].expert)
    assert not torch.equal(with_it[1].expert, without[1].expert)


def gradients(net: DecoderOnly) -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask = batch()
    output = net.decode(ids, mask)
    logits = net.logits(output.hidden[mask])
    (logits.square().mean() + sum(r.losses["load_balance"] for r in output.routings)).backward()
    return logits, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_gradients_flow_through_all_layers_and_recomputation_changes_nothing() -> None:
    plain, again = model(), model(checkpoint=True)
    (a, one), (b, two) = gradients(plain), gradients(again)
    torch.testing.assert_close(a, b)
    assert one.keys() == two.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], msg=name)
    # The first router gets a gradient from the last one's scores: cut the way, and it is another.
    with torch.no_grad():
        for block in (cut := model()).decoder.blocks[1:]:
            block.feed_forward.router.residual.weight.zero_()
    assert not torch.allclose(one["decoder.layers.0.feed_forward.router.weight"], gradients(cut)[1][
        "decoder.layers.0.feed_forward.router.weight"
    ])  # fmt: skip


@torch.no_grad()
def test_cached_decoding_and_padding_change_nothing() -> None:
    net = model().eval()
    ids, mask = batch()
    whole = net.decode(ids).hidden
    cache = net.new_cache()
    pieces = [net.decode(ids[:, a:b], cache=cache).hidden for a, b in ((0, 1), (1, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    padded = net.decode(ids.masked_fill(~mask, 0), mask).hidden
    torch.testing.assert_close(padded[mask], whole[mask])


def test_the_router_keeps_the_contract_of_routers() -> None:
    check_router(lambda: TopKRouter(D, 5, 2, residual=GatingResidual(5, None), init_scale=1.0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="as many scores as there are experts: got 4 for 5"):
        TopKRouter(D, 5, residual=GatingResidual(4, None))
    with pytest.raises(ValueError, match="numbers of experts: got 4 and previous=0"):
        GatingResidual(4, 0)
    x = torch.zeros(3, D)
    with pytest.raises(ValueError, match=r"a layer before with 4 experts .* is of None"):
        TopKRouter(D, 5, residual=GatingResidual(5, 4))(x)
    with pytest.raises(ValueError, match=r"with None experts .* is of 7"):
        TopKRouter(D, 5, residual=GatingResidual(5, None))(x, RoutingContext(previous_logits=torch.zeros(3, 7)))
    with pytest.raises(ValueError, match=r"previous_logits must have one entry per token: got shape \(2, 7\) for 3"):
        RoutingContext(previous_logits=torch.zeros(2, 7)).flatten(3)
    assert RoutingContext(previous_logits=torch.zeros(2, 3, 7)).flatten(6).previous_logits.shape == (6, 7)
    assert mk.routers.switch(D, 5)(x).logits is None, "others hand nothing on"


def test_surgery_refuses_to_take_experts_out_of_it() -> None:
    layer = mk.MoELayer(TopKRouter(D, 5, residual=GatingResidual(5, None)), GroupedMLP(5, D, 8))
    (found,) = sparse_layers(layer).values()
    assert "expert_dims" in str(found.obstacle)
