"""Experts in a transformer and the dense feed-forward of their twin start alike."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from moekit.experts import BASELayerStack, Experts, GroupedGLU, GroupedMLP, MultiHashMLP, ZeroComputationExperts
from moekit.layer import MoELayer
from moekit.routers import switch
from moekit.transformer import GLU, MLP, DecoderOnly, EncoderDecoder, init_weights, materialize

D, F, E, LAYERS = 64, 128, 4, 6

BANKS: dict[str, tuple[Any, type[nn.Module]]] = {
    "mlp": (GroupedMLP, MLP),
    "glu": (GroupedGLU, GLU),
    "multi_hash": (partial(MultiHashMLP, num_segments=1), MLP),
}


def decoder(bank: Any = None, dense: type[nn.Module] = MLP, **options: Any) -> DecoderOnly:
    """Six blocks whose feed-forwards are sparse where a bank is given."""

    def layer(number: int, side: str) -> nn.Module:
        return dense(D, F) if bank is None else MoELayer(switch(D, E), bank(E, D, F))

    return DecoderOnly(50, D, 4, layers=LAYERS, hidden_dim=F, feed_forward=layer, **options)


def bank_of(model: nn.Module, number: int = 0) -> Any:
    return [module for module in model.modules() if isinstance(module, Experts)][number]


@pytest.mark.parametrize("by_depth", [True, False])
@pytest.mark.parametrize("kind", BANKS)
@torch.no_grad()
def test_an_expert_and_its_dense_twin_start_with_the_same_variance(kind: str, by_depth: bool) -> None:
    """Of what they add to the residual stream: 1 / 12 of what one branch alone would give, or all of it."""
    torch.manual_seed(0)
    bank, dense = BANKS[kind]
    sparse, twin = decoder(bank, init_by_depth=by_depth), decoder(None, dense, init_by_depth=by_depth)
    x = torch.randn(2000, D)
    found = torch.stack([bank_of(sparse).reference(e, x).var() for e in range(E)]).mean()
    wanted = twin.decoder.blocks[0].feed_forward(x).var()
    assert float(found / wanted) == pytest.approx(1.0, rel=0.1)
    alone = bank(E, D, F)
    whole = torch.stack([alone.reference(e, x).var() for e in range(E)]).mean()
    assert float(found / whole) == pytest.approx(1 / (2 * LAYERS) if by_depth else 1.0, rel=0.1)


def test_switch_s_tenth_is_a_tenth_of_every_matrix() -> None:
    """Scale 0.1, nothing by depth: std sqrt(0.1 / fan_in) before the cut, 0.88 of it after, reading or writing.

    Source: arXiv:2101.03961 section 2.4.
    """
    torch.manual_seed(0)
    bank = partial(GroupedMLP, init_scale=0.1)
    model = decoder(bank, init_scale=0.1, init_by_depth=False)
    block = model.decoder.blocks[0]
    matrices = {
        "qkv": (block.self_attention.qkv.weight, D),
        "out": (block.self_attention.out.weight, D),
        "w_in": (bank_of(model).w_in, D),
        "w_out": (bank_of(model).w_out, F),
        "router": (block.feed_forward.router.weight, D),
    }
    dense = decoder(init_scale=0.1, init_by_depth=False).decoder.blocks[0].feed_forward
    matrices |= {"dense in": (dense.w_in.weight, D), "dense out": (dense.w_out.weight, F)}
    for name, (weight, fan_in) in matrices.items():
        nominal = (0.1 / fan_in) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(0.8796 * nominal, rel=0.08), name
        assert float(weight.detach().abs().max()) <= 2 * nominal, name


@torch.no_grad()
def test_a_divisor_is_applied_once() -> None:
    model = decoder(GroupedMLP)
    bank = bank_of(model)
    before = bank.w_out.clone()
    init_weights(model)
    assert torch.equal(bank.w_out, before)
    twin = copy.deepcopy(model)
    init_weights(twin, by_depth=False)
    assert torch.allclose(bank_of(twin).w_out, before * (2 * LAYERS) ** 0.5)
    assert torch.equal(bank_of(twin).w_in, bank.w_in)
    init_weights(twin, by_depth=True)
    assert torch.allclose(bank_of(twin).w_out, before)
    torch.manual_seed(0)
    bank.reset_parameters()  # keeps its place
    assert float(bank.w_out.std() / before.std()) == pytest.approx(1.0, rel=0.05)


@torch.no_grad()
def test_a_stack_keeps_its_scale_on_the_meta_device() -> None:
    """What was drawn without memory is drawn with the scale that the model was built with."""
    bank = partial(GroupedMLP, init_scale=0.1)
    with torch.device("meta"):
        model = decoder(bank, init_scale=0.1, init_by_depth=False)
    materialize(model, "cpu")
    reference = decoder(bank, init_scale=0.1, init_by_depth=False)
    for (name, weight), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert float(weight.std()) == pytest.approx(float(other.std()), rel=0.2, abs=1e-9), name
    with torch.device("meta"):
        model = decoder(GroupedMLP)
    materialize(model, "cpu")
    assert float(bank_of(model).w_out.std()) == pytest.approx(float(bank_of(decoder(GroupedMLP)).w_out.std()), rel=0.1)


@torch.no_grad()
def test_each_side_has_its_own_number_of_branches() -> None:
    model = EncoderDecoder(
        50, D, 4, encoder_layers=2, decoder_layers=4, hidden_dim=F,
        feed_forward=lambda layer, side: MoELayer(switch(D, E), GroupedMLP(E, D, F)),
    )  # fmt: skip
    assert bank_of(model.encoder).depth_scale == 1 / 4
    assert bank_of(model.decoder).depth_scale == 1 / 12


@torch.no_grad()
def test_banks_around_banks_and_banks_that_start_at_zero() -> None:
    """The bank inside is scaled, what needs none is left alone."""
    model = decoder(lambda e, d, f: ZeroComputationExperts(GroupedMLP(e - 3, d, f), zero=1, copy=1, constant=1))
    outer, inner = bank_of(model), bank_of(model, 1)
    assert (outer.depth_scale, inner.depth_scale) == (1.0, 1 / (2 * LAYERS))
    assert float(outer.value.std()) == pytest.approx(1.0, abs=0.4)
    assert not bank_of(decoder(BASELayerStack)).w_out.any()


@pytest.mark.parametrize("kind", BANKS)
@torch.no_grad()
def test_outputs_are_what_a_bank_is_linear_in(kind: str) -> None:
    """A quarter of the variance halves what every expert gives, and the next draw keeps it."""
    torch.manual_seed(0)
    bank = BANKS[kind][0](E, D, F)
    x = torch.randn(50, D)
    before = [bank.reference(e, x) for e in range(E)]
    deviation = {name: getattr(bank, name).std() for name in bank.outputs}
    bank.scale_outputs_(0.25)
    for e in range(E):
        torch.testing.assert_close(bank.reference(e, x), before[e] / 2)
    bank.reset_parameters()
    for name, std in deviation.items():
        assert float(getattr(bank, name).std() / std) == pytest.approx(0.5, rel=0.05)
