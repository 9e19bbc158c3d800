"""Whole models: causality, padding, routing context, checkpointing, tying, precision, meta device, compilation."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from moekit import experts, routers
from moekit.component import Component
from moekit.layer import MoELayer, MoEOutput
from moekit.routing import Capacity, Router, Routing, RoutingContext
from moekit.transformer import (
    GLU,
    Block,
    DecoderOnly,
    EncoderDecoder,
    EncoderOnly,
    Positions,
    RelativePositions,
    RMSNorm,
    RotaryPositions,
    SinusoidalPositions,
    TokenEmbedding,
    every_other,
    init_weights,
    materialize,
)
from moekit.transformer.attention import plan_attention

VOCAB, DIM, HEADS = 31, 16, 4
POSITIONS: dict[str, Callable[[], Positions]] = {
    "relative": lambda: RelativePositions(HEADS),
    "rotary": RotaryPositions,
    "sinusoidal": SinusoidalPositions,
}


def sparse(layer: int, side: str) -> nn.Module:
    return MoELayer(routers.switch(DIM, 4, capacity_factor=None, jitter=0.0), experts.GroupedMLP(4, DIM, 24))


def seq2seq(positions: Positions | None = None, *, moe: bool = True, **options: object) -> EncoderDecoder:
    torch.manual_seed(0)
    feed = every_other(sparse) if moe else None
    return EncoderDecoder(VOCAB, DIM, HEADS, 2, 2, 24, feed_forward=feed, positions=positions, **options)  # type: ignore[arg-type]


def language_model(positions: Positions | None = None, **options: object) -> DecoderOnly:
    torch.manual_seed(0)
    return DecoderOnly(VOCAB, DIM, HEADS, 2, 24, feed_forward=every_other(sparse), positions=positions, **options)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source, its mask, target, its mask."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, VOCAB, (3, 7), generator=generator)
    target = torch.randint(3, VOCAB, (3, 6), generator=generator)
    source_mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    target_mask = torch.arange(6) < torch.tensor([3, 6, 5])[:, None]
    return source.masked_fill(~source_mask, 0), source_mask, target.masked_fill(~target_mask, 0), target_mask


def run(model: EncoderDecoder, language: Tensor | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
    source, source_mask, target, target_mask = batch()
    encoded = model.encode(source, source_mask, language)
    decoded = model.decode(target, encoded.hidden, source_mask, target_mask, language)
    return model.logits(decoded.hidden[target_mask]), encoded.routings + decoded.routings


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
            "position": torch.arange(length).repeat(rows, 1),
            "task": language[:, None].repeat(1, length),
            "sequence": torch.arange(rows)[:, None].repeat(1, length),
        }
        assert {f.name for f in fields(context)} == set(expected)
        for name, value in expected.items():
            assert torch.equal(getattr(context, name), value.flatten()), name
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


# --- training ----------------------------------------------------------------------------------------------------


def step(model: nn.Module) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    logits, routings = run(model)  # type: ignore[arg-type]
    loss = logits.logsumexp(-1).mean() + sum(r.losses["load_balance"] for r in routings)
    loss.backward()
    leaves = [leaf.detach() for leaf in _pytree.tree_leaves(routings) if isinstance(leaf, Tensor)]
    return loss.detach(), leaves, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_nothing() -> None:
    """With dropout and router jitter, whose draws must be the same the second time."""

    def jittery(layer: int, side: str) -> nn.Module:
        return MoELayer(routers.switch(DIM, 4, jitter=0.2), experts.GroupedMLP(4, DIM, 24, dropout=0.1))

    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = EncoderDecoder(
            VOCAB, DIM, HEADS, 3, 3, 24,
            feed_forward=every_other(jittery), dropout=0.2, attention_dropout=0.1, checkpoint=checkpoint,
        )  # fmt: skip
        results.append(step(model))
    (loss, routings, gradients), (other_loss, other_routings, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert len(routings) == len(other_routings) > 0
    assert all(torch.equal(a, b) for a, b in zip(routings, other_routings, strict=True))
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_checkpointing_saves_activations() -> None:
    """Fewer tensors are kept for backward, or the option would be idle."""
    kept = []
    for checkpoint in (False, True):
        model, sizes = seq2seq(moe=False, checkpoint=checkpoint), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            run(model)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_every_parameter_gets_a_gradient() -> None:
    for tied in (True, False):
        model = seq2seq(tied=tied)
        gradients = step(model)[2]
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name
            if "norm.bias" not in name:
                assert gradient.any(), name


def test_gradients_of_a_block_are_right() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(VOCAB, 4, 2, 1, 1, 6, feed_forward=lambda layer, side: GLU(4, 6)).double()
    _, source_mask, target, _ = batch()

    def compute(x: Tensor, memory: Tensor) -> Tensor:
        return model.decoder(x, target[:2, :3], memory=memory, memory_mask=source_mask[1:, :5]).hidden

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, (x, memory))


# --- weights -----------------------------------------------------------------------------------------------------


def test_tied_weights_are_one_parameter_and_stay_one() -> None:
    model = seq2seq()
    names = [name for name, _ in model.named_parameters() if "embedding" in name or "output" in name]
    assert names == ["embedding.weight"]
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = seq2seq(moe=True)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.zero_()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    expected = run(model)[0]
    for other in (twin, loaded):
        torch.testing.assert_close(run(other)[0], expected, rtol=0, atol=0)
        with torch.no_grad():
            other.embedding.weight[5, :3] += 1.0  # a constant would vanish in the first norm
            source, target = torch.tensor([[5]]), torch.tensor([[1]])
            before, after = model.encode(source).hidden, other.encode(source).hidden
            assert not torch.allclose(before, after)
            hidden = torch.randn(DIM)
            assert not torch.allclose(model.logits(hidden)[5], other.logits(hidden)[5])
            memory = torch.zeros(1, 1, DIM)
            same = model.decode(target, memory).hidden, other.decode(target, memory).hidden
            torch.testing.assert_close(*same, rtol=0, atol=0)


def test_untied_models_have_three_tables() -> None:
    model = seq2seq(tied=False)
    names = {name for name, _ in model.named_parameters() if "embedding" in name or name.startswith("output")}
    assert names == {"embedding.weight", "target_embedding.weight", "output.weight"}
    assert len(dict(language_model(tied=False).named_parameters())) == 1 + len(
        dict(language_model().named_parameters())
    )


def test_positions_with_weights_belong_to_one_side() -> None:
    model = seq2seq(RelativePositions(HEADS))
    assert model.encoder.positions is not model.decoder.positions
    assert model.encoder.positions.weight is not model.decoder.positions.weight


@torch.no_grad()
@pytest.mark.parametrize("scale", ["input", "output"])
def test_variance_at_the_start(scale: str) -> None:
    """Embeddings enter and logits leave with about unit variance, whatever the depth and the scaling."""
    torch.manual_seed(0)
    model = EncoderDecoder(2000, 64, 4, 12, 1, 256, embedding_scale=scale)  # type: ignore[arg-type]
    ids = torch.randint(0, 2000, (8, 32))
    assert float(model.embedding(ids).std()) == pytest.approx(1.0, rel=0.05)
    hidden = model.encode(ids).hidden
    assert float(model.logits(hidden).std()) == pytest.approx(1.0, rel=0.15)
    before_norm: list[Tensor] = []
    model.encoder.norm.register_forward_hook(lambda module, args, output: before_norm.append(args[0]))
    model.encode(ids)
    assert 1.0 < float(before_norm[0].std()) < 2.0
    with pytest.raises(ValueError, match='must be "input" or "output"'):
        TokenEmbedding(3, 4, scale="both")  # type: ignore[arg-type]


@torch.no_grad()
def test_initialisation_leaves_other_modules_alone() -> None:
    model = seq2seq(bias=True)
    moe = model.encoder.layers[1].feed_forward
    before = {name: weight.clone() for name, weight in moe.named_parameters()}
    attention = model.encoder.layers[0].self_attention
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.bias.fill_(3.0)
    init_weights(model)
    assert all(torch.equal(before[name], weight) for name, weight in moe.named_parameters())
    assert attention.qkv.weight.any()
    assert not attention.qkv.bias.any()
    small = copy.deepcopy(model)
    init_weights(small, scale=0.1)
    ratio = (
        small.encoder.layers[0].feed_forward.w_in.weight.std() / model.encoder.layers[0].feed_forward.w_in.weight.std()
    )
    assert float(ratio) == pytest.approx(0.1**0.5, rel=0.2)


@torch.no_grad()
def test_built_on_the_meta_device_and_given_memory_later() -> None:
    with torch.device("meta"):
        model = seq2seq(tied=False, bias=True)
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(float("nan"))
    materialize(model, "cpu")
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert list(model.buffers()) == []
    reference = seq2seq(tied=False, bias=True)
    for (name, weight), (other_name, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other_name
        assert float(weight.std()) == pytest.approx(float(other.std()), rel=0.35, abs=1e-9), name


def test_ten_billion_parameters_on_the_meta_device() -> None:
    """Z-code M3's shape: 24 + 12 layers, 64 experts in every other one, 250,000 tokens."""
    dim, hidden, vocabulary = 1024, 4096, 250_000

    def moe(layer: int, side: str) -> nn.Module:
        return MoELayer(routers.zcode_m3(dim, 64, allow_future=True), experts.GroupedMLP(64, dim, hidden))

    with torch.device("meta"):
        model = EncoderDecoder(vocabulary, dim, 16, 24, 12, hidden, feed_forward=every_other(moe))
    attention, feed, norm = 4 * dim * dim, 2 * dim * hidden, 2 * dim
    routed = 64 * feed + sum(p.numel() for p in model.encoder.layers[1].feed_forward.router.parameters())
    expected = vocabulary * dim + 2 * 32 * 16  # embeddings and two tables of relative positions
    expected += 24 * (attention + 2 * norm) + 12 * (2 * attention + 3 * norm) + 2 * norm
    expected += 18 * feed + 18 * routed
    assert sum(p.numel() for p in model.parameters()) == expected
    assert 10.0e9 < expected < 10.5e9


# --- precision and compilation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_bf16_autocast_and_bf16_weights_stay_near_float32(positions: str, norm: str) -> None:
    options = {} if norm == "layer" else {"norm": RMSNorm}
    model = seq2seq(POSITIONS[positions](), moe=False, **options)
    expected = run(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(model)[0]
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    logits = run(copy.deepcopy(model).bfloat16())[0]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_bf16_with_experts_runs_and_differentiates() -> None:
    for whole in (False, True):
        model = seq2seq()
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
            logits, routings = run(model.bfloat16() if whole else model)
        assert all(r.weight.dtype == torch.float32 for r in routings)
        (logits.float().square().mean() + sum(r.losses["load_balance"] for r in routings)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_cached_decoding_under_bf16() -> None:
    for make in POSITIONS.values():
        model = seq2seq(make(), moe=False).bfloat16().eval()
        source, source_mask, target, _ = batch()
        with torch.inference_mode():
            memory = model.encode(source, source_mask).hidden
            whole, cache = model.decode(target, memory, source_mask).hidden, model.new_cache()
            parts = [model.decode(target[:, i : i + 1], memory, source_mask, cache=cache).hidden for i in range(6)]
        torch.testing.assert_close(torch.cat(parts, 1).float(), whole.float(), rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_dense_block_compiles_into_one_graph(backend: str) -> None:
    block = seq2seq(RotaryPositions(), moe=False).encoder.layers[0].eval()
    x = torch.randn(2, 5, DIM)
    plan = plan_attention(x, RotaryPositions(), DIM // HEADS, offset=0, causal=True)
    try:
        hidden = torch.compile(block, fullgraph=True, backend=backend)(x, plan).hidden
    except Exception as error:
        if backend == "inductor" and "compiler" in str(error).lower():
            pytest.skip(f"torch.compile found no C++ compiler: {error}")
        raise
    torch.testing.assert_close(hidden, block(x, plan).hidden)
