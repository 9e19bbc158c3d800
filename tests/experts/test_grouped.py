"""Grouped experts: by hand, dropout, initialisation, errors. The contract is in tests/contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moekit.experts import Experts, GroupedGLU, GroupedMLP, copy_first_expert_
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


@pytest.mark.parametrize(("kind", "start"), [("add", 0.0), ("multiply", 1.0)])
def test_expert_bias_of_st_moe(kind: str, start: float) -> None:
    """(GELU(x W_gate) * x W_up) [+ B, * B] W_out; at the start the bias changes nothing."""
    experts = GroupedGLU(E, D, H, hidden_bias=kind, init_scale=1.0)  # type: ignore[arg-type]
    plain = GroupedGLU(E, D, H, init_scale=1.0)
    plain.load_state_dict({n: w for n, w in experts.state_dict().items() if n != "b_hidden"})
    assert experts.b_hidden.shape == (E, H)
    assert (experts.b_hidden == start).all()
    rows = torch.randn(7, D)
    assert_close(experts(rows, COUNTS), plain(rows, COUNTS))
    with torch.no_grad():
        experts.b_hidden.normal_()
    out = experts(rows, COUNTS).split(COUNTS.tolist())
    for e, block in enumerate(rows.split(COUNTS.tolist())):
        hidden = F.gelu(block @ experts.w_gate[e], approximate="tanh") * (block @ experts.w_up[e])
        bias = experts.b_hidden[e]
        hidden = hidden + bias if kind == "add" else hidden * bias
        assert_close(out[e], hidden @ experts.w_out[e], f"expert {e}")


def test_unknown_expert_bias() -> None:
    with pytest.raises(ValueError, match='hidden_bias must be "none", "add" or "multiply": got \'mult\''):
        GroupedGLU(E, D, H, hidden_bias="mult")  # type: ignore[arg-type]


@pytest.mark.parametrize("bank", [GroupedMLP(E, D, H, bias=True), GroupedGLU(E, D, H, hidden_bias="add")])
def test_experts_can_start_as_copies_of_the_first(bank: Experts) -> None:
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    first = {name: parameter[0].clone() for name, parameter in bank.named_parameters()}
    copy_first_expert_(bank)
    for name, parameter in bank.named_parameters():
        for e in range(E):
            assert torch.equal(parameter[e], first[name])
    with torch.device("meta"):
        copy_first_expert_(GroupedMLP(E, D, H))  # nothing to copy, no error


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
    (scale,) = out[~dropped].unique().tolist()  # one rate for a call: of packed bits a multiple of 1 / 256
    assert scale == pytest.approx(1 / 0.6, rel=0.01)
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
