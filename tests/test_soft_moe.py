"""Soft MoE against a literal loop, its gradients, padding, and causality."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from moekit import RoutingContext, SoftMoELayer, routing_stats
from moekit.experts import GroupedGLU, GroupedMLP
from moekit.testing import assert_close, assert_same, check_routing, seeded, trace
from moekit.testing.modules import check_checkpointing, check_compiles, check_has_a_source, check_meta_device
from moekit.transformer import DecoderOnly, EncoderDecoder, every_other, routed_layers

B, N, D, E, S = 3, 7, 5, 4, 2
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3, [False, True, False, True, False, False, False]])


def layer(slots: int = S) -> SoftMoELayer:
    with seeded(0):
        soft = SoftMoELayer(GroupedMLP(E, D, 8, bias=True, init_scale=1.0), slots)
        with torch.no_grad():
            soft.scale.fill_(3.0)
    return soft


def loop(soft: SoftMoELayer, x: Tensor, mask: Tensor) -> Tensor:
    """Algorithm 1, token by token and slot by slot."""
    out = torch.zeros_like(x)
    phi = soft.phi / soft.phi.norm(dim=1, keepdim=True)
    for b in range(x.shape[0]):
        real = [n for n in range(x.shape[1]) if mask[b, n]]
        scores = {(n, j): soft.scale * (x[b, n] / x[b, n].norm()) @ phi[j] for n in real for j in range(len(phi))}
        computed = []
        for j in range(len(phi)):
            total = sum(scores[n, j].exp() for n in real)
            slot = sum(scores[n, j].exp() / total * x[b, n] for n in real)
            if real:
                computed.append(soft.experts.reference(j // soft.slots, slot[None])[0])  # type: ignore[index]
        for n in real:
            total = sum(scores[n, j].exp() for j in range(len(phi)))
            out[b, n] = sum(scores[n, j].exp() / total * computed[j] for j in range(len(phi)))
    return out


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loop(slots: int, masked: bool) -> None:
    """Outputs and all gradients."""
    soft = layer(slots).double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    mask = MASK if masked else torch.ones(B, N, dtype=torch.bool)
    context = RoutingContext(mask=mask) if masked else None
    fast = trace(lambda x: soft(x, context).hidden, soft, x)
    assert_same(fast, trace(lambda x: loop(soft, x, mask), soft, x), "differs from Algorithm 1")


def test_gradcheck() -> None:
    soft = layer().double()
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    context = RoutingContext(mask=torch.tensor([[True, True, False], [True, True, True]]))

    def run(x: Tensor, phi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(soft, {"phi": phi, "scale": scale}, (x, context))
        return out.hidden, out.routing.weight

    leaves = (p.detach().clone().requires_grad_() for p in (soft.phi, soft.scale))
    assert gradcheck(run, (x, *leaves))


def test_sequences_are_apart_and_padding_is_nobody() -> None:
    soft, x = layer(), torch.randn(B, N, D)
    context = RoutingContext(mask=MASK)
    together = soft(x, context).hidden
    for b in range(B):
        alone = soft(x[b][MASK[b]]).hidden
        assert_close(together[b][MASK[b]], alone, f"sequence {b}")
    assert not together[~MASK].any()
    spoilt = x.masked_fill(~MASK[:, :, None], float("nan"))
    assert_same(
        trace(lambda x: soft(x.where(MASK[:, :, None], spoilt), context), soft, x),
        trace(lambda x: soft(x.where(MASK[:, :, None], 0.0), context), soft, x),
        "padding matters",
    )
    nothing = trace(partial(soft, context=RoutingContext(mask=torch.zeros_like(MASK))), soft, x)
    assert all(value.isfinite().all() for value in nothing.values())
    assert not nothing["output"].any()


@pytest.mark.parametrize("shape", [(N, D), (2, 2, N, D), (0, N, D), (2, 0, D)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    soft, x = layer(), torch.randn(shape)
    hidden, routing = soft(x)
    assert hidden.shape == shape
    assert routing.num_tokens == x[..., 0].numel()
    if len(shape) == 4:
        assert_close(hidden[1, 0], soft(x[1, 0]).hidden)


def test_context_of_a_stack_is_flat() -> None:
    soft, x = layer(), torch.randn(B, N, D)
    flat = RoutingContext(mask=MASK.reshape(-1))
    assert torch.equal(soft(x, flat).hidden, soft(x, RoutingContext(mask=MASK)).hidden)


def test_routing_and_statistics() -> None:
    """Shares of a token sum to 1; load is even; entropies are those of the shares and of the slots' mixtures."""
    soft, x = layer(), torch.randn(B, N, D)
    context = RoutingContext(mask=MASK)
    routing = soft(x, context).routing
    check_routing(routing, context.flatten(B * N))
    share = routing.weight.view(E, B * N).t()[MASK.reshape(-1)]
    assert_close(share.sum(1), torch.ones(len(share)))
    assert routing_stats(routing).load.tolist() == [int(MASK.sum())] * E
    assert_close(routing.statistics["entropy"], -(share * share.log()).sum(1).mean())
    assert not routing.losses
    with torch.no_grad():
        soft.scale.fill_(0.0)
    flat = soft(x).routing.statistics
    assert float(flat["entropy"]) == pytest.approx(torch.tensor(E).log().item())
    assert float(flat["slot_entropy"]) == pytest.approx(torch.tensor(N).log().item())


def test_any_bank_any_length() -> None:
    """The experts compute E * S rows a sequence, however long it is."""
    seen: list[tuple[int, ...]] = []

    class Bank(GroupedGLU):
        def forward(self, rows: Tensor, counts: Tensor | None = None) -> Tensor:
            seen.append(tuple(rows.shape))
            return super().forward(rows, counts)

    soft = SoftMoELayer(Bank(E, D, 8), S)
    soft(torch.randn(2, 5, D))
    soft(torch.randn(2, 50, D))
    assert seen == [(E, 2 * S, D)] * 2


def test_precision_and_copies() -> None:
    soft, x = layer(), torch.randn(B, N, D)
    plain = trace(soft, soft, x)
    for twin in (copy.deepcopy(soft), pickle.loads(pickle.dumps(soft))):
        assert_same(trace(twin, twin, x), plain, "a copy computes something else")
    half = copy.deepcopy(soft).bfloat16()
    out = half(x.bfloat16())
    assert out.hidden.dtype == torch.bfloat16
    assert out.routing.weight.dtype == torch.float32
    wide = half.float()(x.bfloat16().float())
    assert_close(out.hidden, wide.hidden)
    assert_close(out.routing.weight, wide.routing.weight, "weights are computed in float32")
    with torch.autocast("cpu", torch.bfloat16):
        cast = soft(x)
    assert cast.hidden.dtype == torch.float32
    assert_close(cast.routing.weight, soft(x).routing.weight, "under autocast too")


def test_contract_of_modules() -> None:
    check_meta_device(layer)
    check_has_a_source(layer)
    check_checkpointing(layer(), torch.randn(B, N, D))
    check_compiles(layer(), [torch.randn(B, N, D), torch.randn(B, N, D)])


def test_not_in_a_decoder_unasked() -> None:
    def make(allow: bool) -> DecoderOnly:
        feed = every_other(lambda layer, side: SoftMoELayer(GroupedMLP(E, 16, 8), allow_future=allow))
        return DecoderOnly(20, 16, 4, 2, 24, feed_forward=feed)

    with pytest.raises(ValueError, match=r"leaks the future in a causal decoder.*allow_future=True"):
        make(False)
    make(True)


def test_in_an_encoder() -> None:
    def sparse(layer: int, side: str) -> nn.Module | None:
        return SoftMoELayer(GroupedMLP(E, 16, 8)) if side == "encoder" else None

    model = EncoderDecoder(20, 16, 4, 2, 2, 24, feed_forward=every_other(sparse))
    ids, mask = torch.randint(3, 20, (3, 7)), MASK.clone()
    mask[2] = torch.arange(7) < 2
    encoded = model.encode(ids, mask)
    assert len(encoded.routings) == 1
    assert encoded.routings[0].num_experts == E
    longer = model.encode(torch.nn.functional.pad(ids, (0, 2)), torch.nn.functional.pad(mask, (0, 2)))
    assert_close(longer.hidden[:, :7][mask], encoded.hidden[mask], "padding changes real tokens")
    assert routed_layers(model) == {"encoder.1": model.encoder.blocks[1].feed_forward}


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="slots must be at least 1: got 0"):
        SoftMoELayer(GroupedMLP(E, D, 8), 0)
