"""Who sees whom, and what routers are told: causality, padding, caching, routing context."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tiny_models import DIM, HEADS, POSITIONS, VOCAB, batch, language_model, run, seq2seq, sparse
from torch import Tensor, nn

from moekit import experts, routers
from moekit.component import Component
from moekit.layer import MoELayer, MoEOutput
from moekit.routing import Capacity, Router, Routing, RoutingContext
from moekit.transformer import (
    Block,
    DecoderOnly,
    EncoderDecoder,
    EncoderOnly,
    Positions,
    every_other,
)
from moekit.transformer.attention import plan_attention

# --- who sees whom -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_later_tokens_never_change_earlier_results(positions: str) -> None:
    ids = batch()[2].clamp_min(3)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 5) % VOCAB
    model = language_model(POSITIONS[positions]()).double()
    a, b = model.decode(ids).hidden, model.decode(changed).hidden
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=0, atol=1e-14)
    assert (a[:, 3:] - b[:, 3:]).abs().amax(-1).gt(1e-6).all()
    both = seq2seq(POSITIONS[positions]()).double()
    memory = both.encode(batch()[0]).hidden
    a, b = both.decode(ids, memory).hidden, both.decode(changed, memory).hidden
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=0, atol=1e-14)
    assert (a[:, 3:] - b[:, 3:]).abs().amax(-1).gt(1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_order_matters(positions: str) -> None:
    """Two tokens change places: without positions an encoder could not tell."""
    ids = torch.tensor([[5, 6, 7, 8]])
    swapped = torch.tensor([[6, 5, 7, 8]])
    for make, differs in ((POSITIONS[positions], True), (Positions, False)):
        model = seq2seq(make(), moe=False).double()
        a, b = model.encode(ids).hidden[0, 2:], model.encode(swapped).hidden[0, 2:]
        assert bool((a - b).abs().max() > 1e-6) == differs


def with_padding(model: EncoderDecoder, source_pad: int, target_pad: int) -> tuple[Tensor, dict[str, Tensor]]:
    source, source_mask, target, target_mask = batch()
    source = torch.where(source_mask, source, source_pad)
    target = torch.where(target_mask, target, target_pad)
    model.zero_grad()
    encoded = model.encode(source, source_mask)
    decoded = model.decode(target, encoded.hidden, source_mask, target_mask)
    logits = model.logits(decoded.hidden[target_mask])
    auxiliary = sum(r.losses["load_balance"] for r in encoded.routings + decoded.routings)
    (logits.square().mean() + auxiliary).backward()
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", POSITIONS)
def test_what_stands_under_the_mask_is_irrelevant(positions: str) -> None:
    model = seq2seq(POSITIONS[positions]()).double()
    logits, gradients = with_padding(model, 0, 0)
    for pads in ((9, 11), (0, 30), (17, 0)):
        others, other_gradients = with_padding(model, *pads)
        torch.testing.assert_close(logits, others, rtol=0, atol=1e-14)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-12, atol=1e-14, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_padded_batches_equal_their_sentences(positions: str) -> None:
    model = seq2seq(POSITIONS[positions]()).double()
    source, source_mask, target, target_mask = batch()
    memory = model.encode(source, source_mask).hidden
    hidden = model.decode(target, memory, source_mask, target_mask).hidden
    for row in range(3):
        s, t = int(source_mask[row].sum()), int(target_mask[row].sum())
        alone = model.encode(source[row : row + 1, :s]).hidden
        torch.testing.assert_close(memory[row, :s], alone[0])
        torch.testing.assert_close(hidden[row, :t], model.decode(target[row : row + 1, :t], alone).hidden[0])


def test_padding_on_the_left_is_refused_by_decoders_only() -> None:
    model, (source, source_mask, target, target_mask) = seq2seq(), batch()
    memory = model.encode(source, source_mask.flip(1)).hidden
    with pytest.raises(ValueError, match="padding on the right only"):
        model.decode(target, memory, source_mask, target_mask.flip(1))


def test_cached_decoding_in_uneven_pieces_equals_the_whole() -> None:
    for make in POSITIONS.values():
        model = seq2seq(make()).double().eval()
        source, source_mask, target, _ = batch()
        with torch.no_grad():
            memory = model.encode(source, source_mask).hidden
            whole = model.decode(target, memory, source_mask)
            cache, pieces = model.new_cache(), []
            for a, b in ((0, 1), (1, 4), (4, 6)):
                pieces.append(model.decode(target[:, a:b], memory, source_mask, cache=cache))
        torch.testing.assert_close(torch.cat([p.hidden for p in pieces], 1), whole.hidden)
        assert pieces[-1].cache is cache
        assert whole.cache is None


def test_rows_must_be_a_multiple_of_the_memories() -> None:
    model = seq2seq()
    with pytest.raises(ValueError, match="got 3 target rows and 2 memories"):
        model.decode(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 4, DIM))


# --- routing -----------------------------------------------------------------------------------------------------


class Spy(Component):
    """A routed feed-forward that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[RoutingContext | None] = []
        self.checked = False

    def check_causal(self) -> None:
        self.checked = True

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        self.told.append(context)
        none = torch.zeros(0, dtype=torch.int64)
        return MoEOutput(x, Routing(none, none, none.float(), none, none.bool(), num_tokens=x[..., 0].numel()))


def spied() -> tuple[EncoderDecoder, Spy, Spy]:
    model = EncoderDecoder(VOCAB, DIM, HEADS, 2, 2, 24, feed_forward=every_other(lambda layer, side: Spy()), pad_id=7)
    return model, model.encoder.layers[1].feed_forward, model.decoder.layers[1].feed_forward  # type: ignore[return-value,union-attr]


def test_routers_are_told_everything_about_their_tokens() -> None:
    model, encoder, decoder = spied()
    assert (encoder.checked, decoder.checked) == (False, True)
    source, source_mask, target, target_mask = batch()
    language = torch.tensor([4, 2, 9])
    memory = model.encode(source, source_mask, language).hidden
    model.decode(target, memory, source_mask, target_mask, language)
    for context, ids, mask in ((encoder.told[0], source, source_mask), (decoder.told[0], target, target_mask)):
        rows, length = ids.shape
        assert context is not None
        expected = {
            "mask": mask,
            "token_ids": ids,
            "previous_ids": torch.cat((torch.full((rows, 1), 7), ids[:, :-1]), 1),
            "next_ids": torch.cat((ids.masked_fill(~mask, 7)[:, 1:], torch.full((rows, 1), 7)), 1),
            "position": torch.arange(length).repeat(rows, 1),
            "task": language[:, None].repeat(1, length),
            "sequence": torch.arange(rows)[:, None].repeat(1, length),
        }
        assert {f.name for f in fields(context)} == {*expected, "previous_logits"}
        for name, value in expected.items():
            found = getattr(context, name).view(rows, length)
            assert torch.equal(found if name == "mask" else found[mask], value if name == "mask" else value[mask]), name
        assert context.previous_logits is None, "the router before hands nothing on"
    assert model.routed_layers == ("encoder.1", "decoder.1")
    model.encode(source)
    assert encoder.told[1] is not None
    assert encoder.told[1].mask is None
    assert encoder.told[1].task is None


def test_cached_decoding_tells_routers_the_same() -> None:
    """Token by token, with rows that change places on the way."""
    model, _, decoder = spied()
    source, source_mask, target, _ = batch()
    memory, language = model.encode(source, source_mask).hidden, torch.tensor([4, 2, 9])
    model.decode(target, memory, source_mask, language=language)
    whole = decoder.told.pop()
    assert whole is not None
    with torch.inference_mode():
        cache = model.new_cache()
        model.decode(target[:, :2], memory, source_mask, language=language, cache=cache)
        order = torch.tensor([2, 0, 1])
        cache.reorder(order)
        cache.select_memory(order)
        model.decode(target[order, 2:3], memory[order], source_mask[order], language=language[order], cache=cache)
        model.decode(target[order, 3:], memory[order], source_mask[order], language=language[order], cache=cache)
    assert all(context.next_ids is None for context in decoder.told)  # not known yet
    for name in ("token_ids", "previous_ids", "position", "task"):
        expected = getattr(whole, name).view(3, 6)
        first, *later = (getattr(context, name).view(3, -1) for context in decoder.told)
        assert torch.equal(first, expected[:, :2]), name
        assert torch.equal(torch.cat(later, 1), expected[order, 2:]), name


class Ahead(Router):
    """Refuses to stand in a decoder."""

    num_experts = 4

    def check_causal(self) -> None:
        raise ValueError("looks at later tokens")

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        raise NotImplementedError


def test_a_router_that_looks_ahead_is_refused_in_decoders_at_construction() -> None:
    def ahead(layer: int, side: str) -> nn.Module:
        return MoELayer(Ahead(), experts.GroupedMLP(4, DIM, 24))

    EncoderOnly(VOCAB, DIM, HEADS, 2, 24, feed_forward=every_other(ahead))
    for make in (
        lambda: DecoderOnly(VOCAB, DIM, HEADS, 2, 24, feed_forward=every_other(ahead)),
        lambda: EncoderDecoder(VOCAB, DIM, HEADS, 1, 2, 24, feed_forward=every_other(ahead)),
    ):
        with pytest.raises(ValueError, match="later tokens"):
            make()


def test_random_capacity_is_refused_in_decoders_unless_allowed() -> None:
    def make(allow: bool) -> DecoderOnly:
        def layer(number: int, side: str) -> nn.Module:
            router = routers.TopKRouter(DIM, 4, capacity=Capacity(train=1.0, priority="random"), allow_future=allow)
            return MoELayer(router, experts.GroupedMLP(4, DIM, 24))

        return DecoderOnly(VOCAB, DIM, HEADS, 2, 24, feed_forward=every_other(layer))

    with pytest.raises(ValueError, match="allow_future"):
        make(False)
    make(True)


def test_any_module_is_a_feed_forward_but_routing_without_context_is_refused() -> None:
    model = DecoderOnly(
        VOCAB, DIM, HEADS, 1, 24, feed_forward=lambda layer, side: nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())
    )
    assert model.decode(batch()[2]).routings == ()

    class Sly(nn.Module):
        def forward(self, x: Tensor) -> MoEOutput:
            return Spy()(x)

    model = DecoderOnly(VOCAB, DIM, HEADS, 1, 24, feed_forward=lambda layer, side: Sly())
    with pytest.raises(TypeError, match="Sly returned a MoEOutput but has no check_causal"):
        model.decode(batch()[2])


def test_a_feed_forward_may_be_replaced_later() -> None:
    """Upcycling puts experts into a trained dense model."""
    model = seq2seq(moe=False)
    assert run(model)[1] == ()
    model.encoder.layers[0].feed_forward = sparse(0, "encoder")
    assert model.routed_layers == ("encoder.0",)
    assert len(run(model)[1]) == 1


def test_a_block_wants_a_norm_for_each_branch_and_its_memory() -> None:
    block = seq2seq(moe=False).decoder.layers[0]
    assert isinstance(block, Block)
    with pytest.raises(ValueError, match="one norm for each of its 2 branches: got 3"):
        Block(block.self_attention, nn.Identity(), norms=(nn.Identity(), nn.Identity(), nn.Identity()))
    x = torch.randn(1, 2, DIM)
    with pytest.raises(ValueError, match="needs a memory"):
        block(x, plan_attention(x, Positions(), 4, offset=0, causal=True))
