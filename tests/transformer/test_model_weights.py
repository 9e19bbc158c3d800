"""Training and weights: checkpointing, gradients, tying, initialisation, precision, meta device, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny_models import DIM, HEADS, POSITIONS, VOCAB, batch, language_model, run, seq2seq
from torch import Tensor, nn
from torch.utils import _pytree

from moekit import experts, routers
from moekit.errors import UserError
from moekit.layer import MoELayer
from moekit.transformer import (
    GLU,
    EncoderDecoder,
    RelativePositions,
    RMSNorm,
    RotaryPositions,
    every_other,
    init_weights,
    materialize,
    materialize_modules,
)
from moekit.transformer.attention import plan_attention

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


def test_low_precision_is_drawn_wide_and_rounded() -> None:
    """Also where an attention draws for the projections inside it."""
    with torch.device("meta"):
        wide, narrow = seq2seq(tied=False, bias=True), seq2seq(tied=False, bias=True).bfloat16()
    torch.manual_seed(0)
    materialize(wide, "cpu")
    torch.manual_seed(0)
    order = list(materialize_modules(narrow, "cpu"))
    for (name, weight), other in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(other, weight.bfloat16()), name
    place = {module: number for number, module in enumerate(order)}
    assert set(place) == set(narrow.modules())
    assert all(place[child] < place[module] for module in narrow.modules() for child in module.children())


def test_what_is_shared_stays_shared() -> None:
    with torch.device("meta"):
        one, two = nn.Linear(3, 2), nn.Linear(3, 2)
        two.weight = one.weight
    model = nn.Sequential(one, two)
    materialize(model, "cpu")
    assert model[0].weight is model[1].weight
    assert not model[0].weight.is_meta


def test_a_module_that_cannot_draw_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("mean", torch.zeros(2))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Scale())
    with pytest.raises(UserError, match=r"1\.scale, 1\.mean belong to modules without reset_parameters"):
        materialize(model, "cpu")
    assert model[0].weight.is_meta


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


@pytest.mark.parametrize("positions", POSITIONS)
def test_autocast_leaves_float64_alone(positions: str) -> None:
    """Also what positions add to scores, which autocast would not turn to the queries' type by itself."""
    model = seq2seq(POSITIONS[positions]()).double()
    expected = run(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model)[0], expected)


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
