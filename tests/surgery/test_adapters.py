"""Low-rank adapters: nothing at first, a product when trained, the same function when merged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moekit as mk
from moekit.experts import Experts, GateUpExperts, GroupedGLU, GroupedMLP, ZeroComputationExperts
from moekit.experts.base_layers import BASELayerStack
from moekit.experts.multi_hash import MultiHashMLP
from moekit.parallel.annotation import read_annotations
from moekit.parallel.plan import ShardingPlan
from moekit.surgery.adapters import LinearAdapter, LowRank, add_adapters, is_adapter, merge_adapters, merged_state
from moekit.training.optimizers import parameter_groups
from moekit.transformer import GLU, MLP, EncoderDecoder, every_other
from moekit.transformer.projection import FusedLinear

D, F, E, VOCAB = 8, 12, 3, 30
BANKS: dict[str, Callable[[], Experts]] = {
    "mlp": lambda: GroupedMLP(E, D, F, bias=True),
    "glu": lambda: GroupedGLU(E, D, F, hidden_bias="multiply"),
    "multi_hash": lambda: MultiHashMLP(E, D, F, num_segments=2),
    "gate_up": lambda: GateUpExperts(E, D, F, bias=True),
    "gate_up, inputs first": lambda: GateUpExperts(E, D, F, outputs_first=False),
}
COUNTS = torch.tensor([3, 0, 4])


def stirred(model: nn.Module) -> nn.Module:
    """With adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def network() -> EncoderDecoder:
    """Sparse and dense layers, gated and not, with a shared branch."""
    torch.manual_seed(0)

    def sparse(layer: int, side: str) -> nn.Module:
        if side == "encoder":
            return mk.MoELayer(mk.routers.switch(D, E, jitter=0.0), GroupedMLP(E, D, F), shared=MLP(D, F, bias=True))
        return mk.MoELayer(mk.routers.switch(D, E, jitter=0.0), GroupedGLU(E, D, F))

    layers = every_other(sparse, lambda layer, side: GLU(D, F))
    return EncoderDecoder(VOCAB, D, 2, 2, 2, F, feed_forward=layers).eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(12).view(2, 6) + 3
    assert isinstance(model, EncoderDecoder)
    return model.logits(model.decode(ids, model.encode(ids).hidden).hidden)


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("packed", [True, False])
def test_an_adapted_bank_is_the_bank_with_added_products(kind: str, packed: bool) -> None:
    """Outputs and gradients of the rows equal those of a bank whose matrices are W + alpha / r * down up."""
    torch.manual_seed(0)
    bank = BANKS[kind]().double()
    e = bank.num_experts
    counts = torch.arange(e) % 3 if packed else None
    rows = torch.randn(int(counts.sum()) if counts is not None else e * 2, D, dtype=torch.float64)
    rows = (rows if packed else rows.view(e, 2, D)).requires_grad_()
    plain = bank(rows, counts)
    add_adapters(bank, rank=2, alpha=3.0, targets=("experts",))
    assert torch.equal(bank(rows, counts), plain)

    stirred(bank)
    literal = BANKS[kind]().double()
    with torch.no_grad():
        for name, parameter in literal.named_parameters():
            parameter.copy_(bank.get_parameter(name))
            if name in bank.matrices:
                pair = bank.get_submodule(f"{bank.adapters_name}.{name}")
                down, up = pair.get_parameter("down"), pair.get_parameter("up")
                for n in range(e):
                    added = 3.0 / 2 * down[n] @ up[n]
                    parameter[n] += added.t() if bank.outputs_first else added
    out, expected = bank(rows, counts), literal(rows, counts)
    assert not torch.allclose(out, plain)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, rows, upstream), torch.autograd.grad(expected, rows, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    for n in range(e):
        x = torch.randn(2, D, dtype=torch.float64)
        torch.testing.assert_close(bank.reference(n, x), literal.reference(n, x))


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapted_linear_layer_adds_a_product(fused: bool) -> None:
    torch.manual_seed(0)
    layer: nn.Module = FusedLinear(3, D, F) if fused else nn.Linear(D, F)
    weight = layer.get_parameter("weight").transpose(-1, -2)
    pair = LinearAdapter(weight, 2, 4.0)
    x = torch.randn(2, 5, D)
    assert pair(x).shape == layer(x).shape
    assert not pair(x).any()
    with torch.no_grad():
        pair.up.normal_()
    expected = x @ (2.0 * pair.down @ pair.up) if not fused else torch.stack(
        [x @ (2.0 * pair.down[p] @ pair.up[p]) for p in range(3)], dim=-2
    )  # fmt: skip
    torch.testing.assert_close(pair(x), expected)


def test_nothing_changes_until_adapters_are_trained() -> None:
    model = network()
    before, names = logits(model), set(model.state_dict())
    added = add_adapters(model, rank=2)
    assert torch.equal(logits(model), before)
    assert names < set(model.state_dict()), "the model's own tensors keep their names"
    assert set(added) == {name for name, _ in model.named_parameters()} - names
    assert not torch.allclose(logits(stirred(model)), before)


def test_merged_is_unmerged() -> None:
    """The same function without adapters, from the model and from its state dict alike; copies adapt too."""
    model = network()
    names = set(model.state_dict())
    add_adapters(model, rank=2)
    stirred(model)
    adapted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), adapted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), adapted)
    state = merged_state(model.state_dict())
    merge_adapters(model)
    assert set(model.state_dict()) == names == set(state)
    assert not any(isinstance(module, LowRank) or module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(model), adapted, atol=1e-5, rtol=1e-5)
    assert not any(is_adapter(name) for module in model.modules() for name in getattr(module, "axes", ()))
    add_adapters(model, rank=2)  # and again
    assert merged_state(network().state_dict()).keys() == names


def test_a_bank_or_layer_alone_can_be_merged() -> None:
    for module, x in ((GroupedMLP(E, D, F), torch.randn(E, 2, D)), (MLP(D, F), torch.randn(2, D))):
        add_adapters(module, rank=2, targets=("experts", "feed_forward"))
        adapted = stirred(module)(x)
        merge_adapters(module)
        assert not any(is_adapter(name) for name in module.state_dict())
        torch.testing.assert_close(module(x), adapted, atol=1e-5, rtol=1e-5)


def test_targets_choose_matrices() -> None:
    def adapted(*targets: str) -> set[str]:
        model = network()
        add_adapters(model, rank=2, targets=targets)  # type: ignore[arg-type]
        return {
            name.rpartition(".adapter")[0] for name, m in model.named_modules() if isinstance(m, LowRank)
        }  # fmt: skip

    experts, attention = adapted("experts"), adapted("attention")
    assert experts == {"encoder.layers.1.feed_forward.experts", "decoder.layers.1.feed_forward.experts"}
    assert {name.rpartition(".")[2] for name in attention} == {"qkv", "q", "kv", "out"}
    dense = adapted("feed_forward")
    assert dense == {
        f"{path}.{part}"
        for path in (
            "encoder.layers.0.feed_forward",
            "encoder.layers.1.feed_forward.shared",
            "decoder.layers.0.feed_forward",
        )
        for part in ("w_in", "w_out")
    }
    assert adapted("experts", "attention", "feed_forward") == experts | attention | dense


def test_axes_and_optimizer_groups() -> None:
    """Every adapter's dimensions are named, experts' with their experts; those learn at the experts' rate."""
    model = network()
    added = add_adapters(model, rank=2)
    notes = {note.path: note for note in read_annotations(model, ShardingPlan())}
    for name in added:
        assert len(notes[name].axes) == notes[name].parameter.ndim
        assert "rank" in notes[name].axes
        assert ("expert" in notes[name].axes) == ("experts" in name)
    assert notes["encoder.layers.1.feed_forward.experts.adapters.w_out.down"].axes == ("expert", "mlp", "rank")
    assert notes["encoder.layers.0.self_attention.qkv.adapter.up"].axes == ("part", "rank", "heads")
    assert notes["encoder.layers.0.self_attention.out.adapter.down"].axes == ("heads", "rank")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    groups = {g["name"]: len(g["params"]) for g in parameter_groups(model, lr=1.0)}
    assert groups == {"expert": sum("experts" in name for name in added), "shared": len(added) - groups["expert"]}


def test_a_wrapped_bank_is_adapted_inside() -> None:
    bank = ZeroComputationExperts(GroupedMLP(E, D, F))
    rows = torch.randn(2 * bank.num_experts, D)
    counts = torch.full((bank.num_experts,), 2)
    before = bank(rows, counts)
    add_adapters(bank, rank=2, targets=("experts",))
    assert "experts.adapters.w_in.down" in bank.axes
    changed = stirred(bank)(rows, counts)
    assert torch.equal(changed[2 * E :], before[2 * E :])
    assert not torch.allclose(changed[: 2 * E], before[: 2 * E])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"some of experts, routers, attention, feed_forward: got .'router'"):
        add_adapters(network(), targets=("router",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        add_adapters(network(), targets=())
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.8 for a matrix of 8 x 8: got 9"):
        add_adapters(network(), rank=9)
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.8 .*got 0"):
        add_adapters(network(), rank=0)
    with pytest.raises(ValueError, match="BASELayerStack takes no adapters"):
        add_adapters(BASELayerStack(E, D, F), targets=("experts",))
    with pytest.raises(ValueError, match="must have a matrix of attention"):
        add_adapters(GroupedMLP(E, D, F), targets=("attention",))
    model = network()
    add_adapters(model, rank=2)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model)


def test_routers_are_adapted_where_one_matrix_scores() -> None:
    torch.manual_seed(0)
    router, x = mk.routers.TopKRouter(D, E, 2), torch.randn(5, D)
    layer = mk.MoELayer(router, GroupedMLP(E, D, F))
    add_adapters(layer, rank=2, alpha=3.0, targets=("routers",))
    stirred(layer)
    pair = router.get_submodule("adapter")
    literal = router.weight + (1.5 * pair.get_parameter("down") @ pair.get_parameter("up")).t()
    torch.testing.assert_close(router.logits(x), x @ literal.t())
    changed = layer(x).hidden
    merge_adapters(layer)
    torch.testing.assert_close(router.weight, literal)
    torch.testing.assert_close(layer(x).hidden, changed)
    noisy = mk.MoELayer(mk.routers.NoisyTopKRouter(D, E, 2), GroupedMLP(E, D, F))
    with pytest.raises(ValueError, match="NoisyTopKRouter takes no adapters"):
        add_adapters(noisy, targets=("routers",))
