"""Dense feed-forwards against their formulas, and which layer gets which."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moekit.transformer import GLU, MLP, EncoderDecoder, at_layers, every_other

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
    inner = x @ glu.w_in.weight.T + (glu.w_in.bias if bias else 0)
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
