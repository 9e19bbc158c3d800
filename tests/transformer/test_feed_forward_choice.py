"""Dense feed-forwards against their formulas, and which layer gets which."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moekit import AuxLosses, MoELayer, experts, mixing, routers
from moekit.testing import assert_close
from moekit.transformer import (
    GLU,
    MLP,
    Block,
    DecoderOnly,
    EncoderDecoder,
    LayerNorm,
    SelfAttention,
    SparseDense,
    at_layers,
    every_other,
    init_weights,
    pyramid,
)

ACTIVATIONS = {"relu": F.relu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "silu": lambda x: x * x.sigmoid()}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_dense_feed_forwards(activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    act, x = ACTIVATIONS[activation], torch.randn(2, 3, 5)
    mlp = MLP(5, 7, activation=activation, bias=bias)  # type: ignore[arg-type]
    inner = x @ mlp.w_in.weight.T + (mlp.w_in.bias if bias else 0)
    torch.testing.assert_close(mlp(x), act(inner) @ mlp.w_out.weight.T + (mlp.w_out.bias if bias else 0))
    glu = GLU(5, 7, activation=activation, bias=bias)  # type: ignore[arg-type]
    inner = x @ glu.w_in.weight.flatten(0, 1).T + (glu.w_in.bias.flatten() if bias else 0)
    hidden = act(inner[..., :7]) * inner[..., 7:]
    torch.testing.assert_close(glu(x), hidden @ glu.w_out.weight.T + (glu.w_out.bias if bias else 0))


@pytest.mark.parametrize("kind", [MLP, GLU])
def test_dropout_and_unknown_activations(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = kind(5, 64, dropout=0.5), torch.randn(4, 5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu: got 'tanh'"):
        kind(5, 7, activation="tanh")


class Sparse(nn.Identity):
    pass


class Dense(nn.Identity):
    pass


def kinds(feed_forward: object, encoder: int = 5, decoder: int = 4) -> tuple[str, str]:
    """One letter per layer of each side: S(parse), D(ense) or M(LP, the default)."""
    model = EncoderDecoder(9, 8, 2, encoder, decoder, 16, feed_forward=feed_forward)  # type: ignore[arg-type]
    first, second = (
        "".join(type(block.feed_forward).__name__[0] for block in stack.layers)
        for stack in (model.encoder, model.decoder)
    )
    return first, second


def test_every_other_layer_starts_with_the_second() -> None:
    assert kinds(every_other(lambda layer, side: Sparse())) == ("MSMSM", "MSMS")
    assert kinds(every_other(lambda layer, side: Sparse(), lambda layer, side: Dense())) == ("DSDSD", "DSDS")
    assert kinds(every_other(lambda layer, side: Sparse(), start=3, every=4), 8, 4) == ("MMMSMMMS", "MMMS")
    assert kinds(every_other(lambda layer, side: Sparse(), start=0, every=1)) == ("SSSSS", "SSSS")


def test_layers_can_be_chosen_for_both_sides_or_each() -> None:
    assert kinds(at_layers({0, 3}, lambda layer, side: Sparse())) == ("SMMSM", "SMMS")
    assert kinds(at_layers({"encoder": [4]}, lambda layer, side: Sparse())) == ("MMMMS", "MMMM")
    chosen = at_layers({"encoder": [1], "decoder": [0, 2]}, lambda layer, side: Sparse(), lambda layer, side: Dense())
    assert kinds(chosen) == ("DSDDD", "SDSD")


def test_factories_are_told_layer_and_side() -> None:
    told = []

    def sparse(layer: int, side: str) -> nn.Module:
        told.append((layer, side))
        return Sparse()

    kinds(every_other(sparse))
    assert told == [(1, "encoder"), (3, "encoder"), (1, "decoder"), (3, "decoder")]


def test_senseless_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="every >= 1"):
        every_other(lambda layer, side: None, every=0)
    with pytest.raises(ValueError, match=r"at least 0 \(0 = dense\): got \[0, -2\] \(encoder\)"):
        pyramid([0, -2], lambda layer, side, n: Sparse())
    with pytest.raises(ValueError, match='order must be "after" or "before": got \'between\''):
        SparseDense(Sparse(), Dense(), order="between")  # type: ignore[arg-type]


def test_pyramid_has_experts_by_layer() -> None:
    made = []

    def sparse(layer: int, side: str, num_experts: int) -> nn.Module:
        made.append((side, layer, num_experts))
        return Sparse()

    assert kinds(pyramid([0, 4, 0, 8], sparse), 4, 4) == ("MSMS", "MSMS")
    assert made == [(side, *one) for side in ("encoder", "decoder") for one in ((1, 4), (3, 8))]
    made.clear()
    chosen = pyramid({"decoder": [2, 0, 6]}, sparse, lambda layer, side: Dense())
    assert kinds(chosen, 2, 3) == ("DD", "SDS")
    assert made == [("decoder", 0, 2), ("decoder", 2, 6)]
    with pytest.raises(ValueError, match="got 3 numbers, and the decoder has a layer number 3"):
        kinds(chosen, 2, 4)


@pytest.mark.parametrize("mixed", [False, True])
def test_pyramid_residual_moe(mixed: bool) -> None:
    """PR-MoE: each layer its own number of experts, beside a dense branch that is added or mixed in."""

    def sparse(layer: int, side: str, num_experts: int) -> nn.Module:
        return MoELayer(
            routers.switch(16, num_experts),
            experts.GroupedMLP(num_experts, 16, 24),
            shared=MLP(16, 24),
            mix=mixing.SoftmaxMix(16) if mixed else None,
        )

    model = DecoderOnly(20, 16, 4, 4, 24, feed_forward=pyramid([0, 2, 0, 4], sparse))
    out = model.decode(torch.randint(3, 20, (2, 6)))
    assert [routing.num_experts for routing in out.routings] == [2, 4]
    total, _ = AuxLosses(load_balance=0.01)(*out.routings)
    (out.hidden.sum() + total).backward()
    for block in (model.decoder.blocks[1], model.decoder.blocks[3]):
        feed = block.feed_forward
        assert feed.shared.w_in.weight.grad.any()
        assert not mixed or feed.mix.weight.grad.any()


def sparse_dense(order: str = "after") -> DecoderOnly:
    """Two layers, the second sparse-dense."""
    torch.manual_seed(0)

    def make(layer: int, side: str) -> SparseDense:
        moe = MoELayer(routers.TopKRouter(16, 4, 2), experts.GroupedMLP(4, 16, 24))
        return SparseDense(moe, GLU(16, 20), order=order)  # type: ignore[arg-type]

    return DecoderOnly(20, 16, 4, 2, 24, feed_forward=every_other(make))


@pytest.mark.parametrize("order", ["after", "before"])
def test_sparse_dense_block(order: str) -> None:
    """Two residual branches with norms of their own, in that order."""
    model = sparse_dense(order)
    first, second = model.decoder.blocks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that no two norms are alike
    assert first.extra is None
    assert not any(name.startswith("decoder.layers.0.extra") for name, _ in model.named_parameters())
    seen = {}
    second.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], plan=inputs[1], y=output))
    model.decode(torch.randint(3, 20, (2, 6)))
    x = seen["x"]
    x = x + second.self_attention(second.self_attention_norm(x), seen["plan"], None)
    if order == "after":
        x = x + second.feed_forward(second.feed_forward_norm(x)).hidden
        x = x + second.extra(second.extra_norm(x))
    else:
        x = x + second.extra(second.extra_norm(x))
        x = x + second.feed_forward(second.feed_forward_norm(x)).hidden
    assert_close(seen["y"].hidden, x)
    assert seen["y"].routing.num_experts == 4


def test_sparse_dense_with_cross_attention_and_cache() -> None:
    """Norms fall to the right branches, and decoding token by token equals decoding at once."""
    torch.manual_seed(0)

    def make(layer: int, side: str) -> SparseDense:
        return SparseDense(MoELayer(routers.TopKRouter(16, 4), experts.GroupedMLP(4, 16, 24)), MLP(16, 20))

    model = EncoderDecoder(20, 16, 4, 1, 1, 24, feed_forward=every_other(make, start=0, every=1)).eval()
    ids = torch.randint(3, 20, (2, 5))
    memory = model.encode(ids).hidden
    whole = model.decode(ids, memory).hidden
    cache = model.new_cache()
    steps = [model.decode(ids[:, t : t + 1], memory, cache=cache).hidden for t in range(5)]
    assert_close(torch.cat(steps, dim=1), whole)
    names = {
        name.split(".")[3] for name, _ in model.decoder.named_parameters(prefix="d") if name.startswith("d.layers")
    }
    assert {"extra", "extra_norm", "cross_attention_norm", "feed_forward_norm"} <= names


def test_extra_branches_count_in_the_initialisation() -> None:
    """Output matrices are smaller by the root of the number of residual branches: 2 + 3 here."""
    model = sparse_dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    init_weights(model)
    limit = 2 * (1.0 / 20 / 5) ** 0.5
    largest = float(model.decoder.blocks[1].extra.w_out.weight.detach().abs().max())
    assert 0.8 * limit < largest <= limit


def test_the_extra_feed_forward_is_dense() -> None:
    moe = MoELayer(routers.switch(16, 4), experts.GroupedMLP(4, 16, 24))
    norms = tuple(LayerNorm(16) for _ in range(3))
    with pytest.raises(TypeError, match="its extra feed-forward must be dense: got MoELayer"):
        Block(SelfAttention(16, 4), MLP(16, 24), norms=norms, extra=moe)
    with pytest.raises(ValueError, match="one norm for each of its 3 branches: got 2"):
        Block(SelfAttention(16, 4), moe, norms=norms[:2], extra=MLP(16, 24))
