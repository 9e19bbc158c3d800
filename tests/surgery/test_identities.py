"""Surgery that must not change what a model computes does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import AddNoise, GroupedGLU, GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import CosineRouter, TaskRouter, TopKRouter, UniformRouter
from moekit.routers.loss_free import LossFreeRouter
from moekit.soft_moe import SoftMoELayer
from moekit.surgery import (
    aggregate,
    choose_experts,
    merge,
    require_complete,
    sparse_layers,
    split_experts,
    take_experts,
    upcycle,
)
from moekit.testing.cases import some_context
from moekit.transformer import GLU, MLP, DecoderOnly, every_other

D, F, E, VOCAB = 8, 12, 4, 30
IDS = torch.arange(24).view(2, 12) % VOCAB


def network(num_experts: int = E, k: int = 2, bias: bool = True, hidden: int = F) -> DecoderOnly:
    """A small decoder with two sparse layers; 0 experts = dense."""

    def feed_forward(layer: int, side: str) -> nn.Module:
        if not num_experts:
            return MLP(D, hidden, bias=bias)
        return MoELayer(TopKRouter(D, num_experts, k, init_scale=1.0), GroupedMLP(num_experts, D, hidden, bias=bias))

    model = DecoderOnly(VOCAB, D, 2, 4, F, feed_forward=every_other(feed_forward))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 3:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: DecoderOnly) -> Tensor:
    with torch.no_grad():
        return model.logits(model.decode(IDS).hidden)


def loaded(model: DecoderOnly, state: dict[str, Tensor]) -> DecoderOnly:
    model.load_state_dict(state)
    return model


def first(layers: object, count: int) -> dict[str, Tensor]:
    return {path: torch.arange(count) for path in layers}  # type: ignore[attr-defined]


# -- aggregate and prune -------------------------------------------------------------------------------------------


def test_aggregate_then_keep_the_first_gives_it_back_bit_for_bit() -> None:
    one, two = network(), network(num_experts=3)
    layers = [sparse_layers(one), sparse_layers(two)]
    both = aggregate([one.state_dict(), two.state_dict()], layers, shared_from=0)
    wide = loaded(network(num_experts=E + 3), both)
    again = take_experts(both, sparse_layers(wide), first(layers[0], E))
    assert again.keys() == one.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(again[name], tensor), name
    last = take_experts(both, sparse_layers(wide), {path: torch.arange(E, E + 3) for path in layers[0]})
    experts = [name for layer in layers[1].values() for name in layer.dims]
    assert len(experts) == 2 * 5
    for name in experts:
        assert torch.equal(last[name], two.state_dict()[name]), name


def test_aggregate_of_equal_models_averages_to_the_same() -> None:
    one = network()
    layers = sparse_layers(one)
    both = aggregate([one.state_dict()] * 3, [layers] * 3)
    counted = {name for layer in layers.values() for name in layer.dims}
    for name, tensor in one.state_dict().items():
        expected = torch.cat([tensor] * 3) if name in counted else tensor
        assert torch.equal(both[name], expected), name


def test_aggregate_averages_what_is_shared() -> None:
    one, two = network(), network()
    both = aggregate([one.state_dict(), two.state_dict()], [sparse_layers(one)] * 2)
    weights = [model.state_dict()["embedding.weight"] for model in (one, two)]
    torch.testing.assert_close(both["embedding.weight"], (weights[0] + weights[1]) / 2)
    taken = aggregate([one.state_dict(), two.state_dict()], [sparse_layers(one)] * 2, shared_from=1)
    assert torch.equal(taken["embedding.weight"], weights[1])


def test_pruning_nothing_changes_nothing() -> None:
    model = network()
    state, layers = model.state_dict(), sparse_layers(model)
    load = {path: torch.rand(E) for path in layers}
    for kept in (choose_experts(layers, E, load=load), choose_experts(layers, 0.999, "random"), {}):
        same = take_experts(state, layers, kept)
        assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


# -- the expert axis of every router -------------------------------------------------------------------------------

PERMUTED: dict[str, Callable[[], nn.Module]] = {
    "top-k": lambda: MoELayer(TopKRouter(D, E, 2, init_scale=1.0), GroupedMLP(E, D, F, bias=True)),
    "cosine": lambda: MoELayer(CosineRouter(D, E, 2), GroupedGLU(E, D, F, hidden_bias="multiply")),
    "task": lambda: MoELayer(TaskRouter(D, E, num_tasks=3), GroupedMLP(E, D, F)),
    "loss-free": lambda: MoELayer(LossFreeRouter(D, E, 2, init_scale=1.0), GroupedGLU(E, D, F)),
    "soft": lambda: SoftMoELayer(GroupedMLP(E, D, F), slots=3),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_experts_in_another_order_are_the_same_layer(name: str) -> None:
    """A tensor that counts experts and is not declared, or is in the wrong dimension, would give another function."""
    layer = PERMUTED[name]().eval()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    layers, order = sparse_layers(layer), torch.tensor([2, 0, 3, 1])
    permuted = PERMUTED[name]().eval()
    permuted.load_state_dict(take_experts(layer.state_dict(), layers, {"": order}))
    x = torch.randn(2, 9, D)
    router = getattr(layer, "router", layer)
    context = some_context(router, 18)
    torch.testing.assert_close(permuted(x, context).hidden, layer(x, context).hidden)


# -- upcycle and merge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "glu"])
def test_upcycled_with_uniform_routing_is_the_dense_layer(gated: bool) -> None:
    bias = not gated
    dense = GLU(D, F, bias=bias) if gated else MLP(D, F, bias=bias)
    bank = GroupedGLU(E, D, F) if gated else GroupedMLP(E, D, F, bias=bias, activation="relu")
    sparse = MoELayer(UniformRouter(D, E, k=3), bank).eval()
    state = upcycle(dense.state_dict(), sparse)
    require_complete(state, sparse, "upcycled")
    sparse.load_state_dict(state)
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(sparse(x).hidden, dense(x))


def test_upcycled_parts_together_are_the_dense_layer() -> None:
    """Experts half as wide are the halves in turn; all of them with weights 1/4 are half the sum of two copies."""
    dense = MLP(D, F)
    sparse = MoELayer(UniformRouter(D, E, k=E), GroupedMLP(E, D, F // 2)).eval()
    sparse.load_state_dict(upcycle(dense.state_dict(), sparse, scale=2.0))
    x = torch.randn(5, D)
    torch.testing.assert_close(sparse(x).hidden, dense(x))


def test_upcycling_a_model_keeps_everything_else_and_draws_the_routers() -> None:
    dense, sparse = network(num_experts=0), network()
    state = upcycle(dense.state_dict(), sparse)
    require_complete(state, sparse, "upcycled")
    assert torch.equal(state["embedding.weight"], dense.state_dict()["embedding.weight"])
    path = next(iter(sparse_layers(sparse)))
    assert torch.equal(state[f"{path}.router.weight"], sparse.state_dict()[f"{path}.router.weight"])
    assert torch.equal(state[f"{path}.experts.w_in"][3], dense.state_dict()[f"{path}.w_in.weight"].t())
    noisy = upcycle(dense.state_dict(), sparse, perturb=AddNoise(0.1), seed=1)
    assert not torch.equal(noisy[f"{path}.experts.w_in"][0], noisy[f"{path}.experts.w_in"][1])
    assert torch.equal(noisy[f"{path}.experts.b_in"], state[f"{path}.experts.b_in"])


def test_upcycle_then_merge_gives_the_dense_model_back() -> None:
    dense, sparse = network(num_experts=0), network()
    state = upcycle(dense.state_dict(), sparse)
    back = merge(state, sparse, dense)
    assert back.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(back[name], tensor)


def test_merge_as_wide_as_all_experts_is_their_weighted_sum() -> None:
    bank = GroupedMLP(E, D, F, bias=True)
    with torch.no_grad():
        for bias in (bank.b_in, bank.b_out):
            assert bias is not None
            bias.normal_()
    sparse, dense = MoELayer(TopKRouter(D, E), bank), MLP(D, E * F, bias=True)
    load = torch.tensor([1.0, 0.0, 5.0, 2.0])
    dense.load_state_dict(merge(sparse.state_dict(), sparse, dense, load={"": load}))
    x = torch.randn(6, D)
    expected = sum(load[e] / 8 * bank.reference(e, x) for e in range(E))
    torch.testing.assert_close(dense(x), expected)


def test_merge_by_load_is_the_weighted_average() -> None:
    sparse, dense = MoELayer(TopKRouter(D, E), GroupedGLU(E, D, F)), GLU(D, F)
    load = torch.tensor([0.0, 3.0, 1.0, 0.0])
    merged = merge(sparse.state_dict(), sparse, dense, load={"": load})
    w = sparse.experts.w_out.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(merged["w_out.weight"], (0.75 * w[1] + 0.25 * w[2]).t())


# -- split ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_splitting_then_choosing_all_parts_changes_nothing(parts: int, bias: bool) -> None:
    model = network(bias=bias)
    state = split_experts(model.state_dict(), sparse_layers(model), parts)
    fine = loaded(network(E * parts, 2 * parts, bias, F // parts), state)
    torch.testing.assert_close(logits(fine), logits(model))


def test_splitting_where_parts_keep_the_whole_weight() -> None:
    def layer(parts: int) -> MoELayer:
        router = LossFreeRouter(D, E * parts, 2 * parts, init_scale=1.0)
        return MoELayer(router, GroupedMLP(E * parts, D, F // parts, bias=True)).eval()

    coarse, fine = layer(1), layer(3)
    with torch.no_grad():
        coarse.experts.b_out.normal_()  # type: ignore[union-attr]
    fine.load_state_dict(split_experts(coarse.state_dict(), sparse_layers(coarse), 3, divided=False))
    x = torch.randn(7, D)
    torch.testing.assert_close(fine(x).hidden, coarse(x).hidden)


@pytest.mark.parametrize("gated", [False, True])
def test_moments_of_a_split_are_those_of_the_parts_gradients(gated: bool) -> None:
    """What `power` promises: transformed gradients equal the gradients of the transformed model."""

    def layer(parts: int) -> MoELayer:
        options = {"hidden_bias": "add"} if gated else {"bias": True}
        bank = (GroupedGLU if gated else GroupedMLP)(E * parts, D, F // parts, **options)  # type: ignore[arg-type]
        return MoELayer(TopKRouter(D, E * parts, 2 * parts, init_scale=1.0), bank)

    coarse, fine, x = layer(1), layer(2), torch.randn(7, D)
    layers = sparse_layers(coarse)
    fine.load_state_dict(split_experts(coarse.state_dict(), layers, 2))
    for model in (coarse, fine):
        (model(x).hidden ** 2).sum().backward()
    gradients = {name: p.grad for name, p in coarse.named_parameters() if p.grad is not None}
    expected = split_experts(gradients, layers, 2, power=-1)
    for name, parameter in fine.named_parameters():
        if "router" in name:  # two equal rows share the gradient only on average: which part of a tie is free
            continue
        torch.testing.assert_close(parameter.grad, expected[name])


# -- tables --------------------------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused() -> None:
    dense = network(num_experts=0)
    with pytest.raises(UserError, match="model 0 must have sparse layers: it is a dense model"):
        aggregate([dense.state_dict()] * 2, [sparse_layers(dense)] * 2)
