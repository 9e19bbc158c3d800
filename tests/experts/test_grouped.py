"""Grouped experts: by hand, dropout, initialisation, errors. The contract is in tests/contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moekit.experts import GroupedGLU, GroupedMLP
from moekit.testing import assert_close

E, D, H = 3, 6, 10
COUNTS = torch.tensor([4, 0, 3])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "function"),
    [("relu", F.relu), ("gelu", lambda x: F.gelu(x, approximate="tanh")), ("silu", F.silu)],
)
def test_mlp_is_two_linear_layers(activation: str, function: object, bias: bool) -> None:
    """Each expert equals torch.nn.functional.linear twice with its own slice of the weights."""
    experts = GroupedMLP(E, D, H, activation=activation, bias=bias, init_scale=1.0)  # type: ignore[arg-type]
    if bias:
        with torch.no_grad():
            experts.b_in.normal_()
            experts.b_out.normal_()
    rows = torch.randn(7, D)
    out = experts(rows, COUNTS).split(COUNTS.tolist())
    for e, block in enumerate(rows.split(COUNTS.tolist())):
        b_in, b_out = (experts.b_in[e], experts.b_out[e]) if bias else (None, None)
        hidden = function(F.linear(block, experts.w_in[e].t(), b_in))  # type: ignore[operator]
        assert_close(out[e], F.linear(hidden, experts.w_out[e].t(), b_out), f"expert {e}")


def test_glu_gates() -> None:
    experts = GroupedGLU(E, D, H, activation="silu", init_scale=1.0)
    rows = torch.randn(7, D)
    out = experts(rows, COUNTS).split(COUNTS.tolist())
    for e, block in enumerate(rows.split(COUNTS.tolist())):
        hidden = F.silu(block @ experts.w_gate[e]) * (block @ experts.w_up[e])
        assert_close(out[e], hidden @ experts.w_out[e], f"expert {e}")


@pytest.mark.parametrize("cls", [GroupedMLP, GroupedGLU])
@pytest.mark.parametrize("counts", [torch.tensor([400]), None])
def test_dropout_is_on_the_hidden_activations_in_training(cls: type, counts: torch.Tensor | None) -> None:
    """With identity-like weights the output shows which hidden units were dropped, and the scale of the rest."""
    experts = cls(1, 4, 4, activation="relu", dropout=0.4)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.eye(4)[None])
    rows = torch.ones(400, 4) if counts is not None else torch.ones(1, 400, 4)
    out = experts.train()(rows, counts)
    dropped = out == 0
    assert 0.35 < float(dropped.float().mean()) < 0.45
    assert_close(out[~dropped], torch.full_like(out[~dropped], 1 / 0.6))
    assert torch.equal(experts.eval()(rows, counts), rows)


@pytest.mark.parametrize("cls", [GroupedMLP, GroupedGLU])
def test_initialisation(cls: type) -> None:
    """Variance init_scale / fan in, cut at two standard deviations, every expert its own draw."""
    experts = cls(4, 64, 256, init_scale=0.1)
    for name, weight in experts.named_parameters():
        fan_in = 256 if name == "w_out" else 64
        std = (0.1 / fan_in) ** 0.5
        assert float(weight.detach().abs().max()) <= 2 * std
        assert float(weight.detach().std()) == pytest.approx(0.88 * std, rel=0.03)
        assert not torch.equal(weight[0], weight[1])


def test_biases_begin_at_zero() -> None:
    experts = GroupedMLP(E, D, H, bias=True)
    assert not experts.b_in.any()
    assert not experts.b_out.any()


@pytest.mark.parametrize("cls", [GroupedMLP, GroupedGLU])
def test_unknown_activation(cls: type) -> None:
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu: got 'swish'"):
        cls(E, D, H, activation="swish")
