"""Surgery that must not change what a model computes does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moekit import routers
from moekit.errors import UserError
from moekit.experts import AddNoise, GroupedGLU, GroupedMLP, MultiHashMLP, ZeroComputationExperts
from moekit.layer import MoELayer
from moekit.mixing import SoftmaxMix
from moekit.routers import (
    BASELayerRouter,
    BiasedLinearScorer,
    CosineRouter,
    CosineScorer,
    ExpertChoiceRouter,
    HashRouter,
    HierarchicalRouter,
    LossFreeRouter,
    NoisyTopKRouter,
    ReLURouter,
    SinkhornRouter,
    SparseMixerRouter,
    TaskRouter,
    TaskScorer,
    TaskTableRouter,
    TopKRouter,
    UniformRouter,
    dense_to_sparse,
)
from moekit.routing import Router
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

TABLE = torch.arange(16) % E


def with_experts(router: Router) -> MoELayer:
    return MoELayer(router, GroupedMLP(E, D, F, bias=True))


PERMUTED: dict[str, Callable[[], nn.Module]] = {
    "TopKRouter": lambda: with_experts(TopKRouter(D, E, 2, init_scale=1.0)),
    "SparseMixerRouter": lambda: with_experts(SparseMixerRouter(D, E, scorer=BiasedLinearScorer(1.0), tolerance=1.0)),
    "CosineRouter": lambda: MoELayer(CosineRouter(D, E, 2), GroupedGLU(E, D, F, hidden_bias="multiply")),
    "TaskRouter": lambda: with_experts(TaskRouter(D, E, num_tasks=3)),
    "TaskTableRouter": lambda: with_experts(TaskTableRouter(E, table=[3, 0, 2, 1, 1])),
    "HashRouter": lambda: with_experts(HashRouter(E, TABLE)),
    "TopKRouter, scores of tasks": lambda: with_experts(TopKRouter(D, E, 2, scorer=TaskScorer(3))),
    "LossFreeRouter, scores of tasks": lambda: with_experts(LossFreeRouter(D, E, 2, scorer=TaskScorer(3))),
    "SinkhornRouter, cosines": lambda: with_experts(SinkhornRouter(D, E, 2, scorer=CosineScorer(3))),
    "LossFreeRouter": lambda: MoELayer(LossFreeRouter(D, E, 2, init_scale=1.0), GroupedGLU(E, D, F)),
    "NoisyTopKRouter": lambda: with_experts(NoisyTopKRouter(D, E, 2)),
    "ReLURouter": lambda: with_experts(ReLURouter(D, E, 2)),
    "SinkhornRouter": lambda: with_experts(SinkhornRouter(D, E, 2, init_scale=1.0)),
    "ExpertChoiceRouter": lambda: with_experts(ExpertChoiceRouter(D, E, init_scale=1.0)),
    "BASELayerRouter": lambda: with_experts(BASELayerRouter(D, E)),
    "DenseToSparseRouter": lambda: with_experts(dense_to_sparse(D, E)),
    "SoftMoELayer": lambda: SoftMoELayer(GroupedMLP(E, D, F), slots=3),
}


def test_no_router_is_forgotten() -> None:
    """Of the others, the uniform router has no tensors, and experts of the two-level one belong to groups."""
    kinds = {name: kind for name, kind in vars(routers).items() if isinstance(kind, type)}
    found = {name for name, kind in kinds.items() if issubclass(kind, Router) and not inspect.isabstract(kind)}
    assert found - set(PERMUTED) == {"UniformRouter", "HierarchicalRouter"}
    assert UniformRouter.expert_dims == {}
    layer = with_experts(HierarchicalRouter(D, 2, 2, k_groups=2, k_experts=2))
    with pytest.raises(UserError, match="HierarchicalRouter does not say which of its tensors count experts"):
        take_experts(layer.state_dict(), sparse_layers(layer), {"": torch.arange(2)})


@pytest.mark.parametrize("name", PERMUTED)
def test_experts_in_another_order_are_the_same_layer(name: str) -> None:
    """A tensor that counts experts and is not declared, or is in the wrong dimension, would give another function."""
    layer = PERMUTED[name]().eval()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    layers, order = sparse_layers(layer), torch.tensor([2, 0, 3, 1])
    for tensor_name, tensor in layer.state_dict().items():  # what evaluation does not use is counted too
        if E in tensor.shape:
            assert layers[""].dims[tensor_name] == tensor.shape.index(E)
    permuted = PERMUTED[name]().eval()
    permuted.load_state_dict(take_experts(layer.state_dict(), layers, {"": order}))
    x = torch.randn(2, 9, D)
    context = some_context(getattr(layer, "router", layer), 18)
    torch.testing.assert_close(permuted(x, context).hidden, layer(x, context).hidden)


# -- upcycle and merge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "glu"])
def test_upcycled_with_uniform_routing_is_the_dense_layer(gated: bool) -> None:
    bias = not gated
    dense = GLU(D, F, bias=bias) if gated else MLP(D, F, bias=bias)
    bank = GroupedGLU(E, D, F) if gated else GroupedMLP(E, D, F, bias=bias, activation="relu")
    sparse = MoELayer(UniformRouter(E, k=3), bank).eval()
    state = upcycle(dense.state_dict(), sparse)
    require_complete(state, sparse, "upcycled")
    sparse.load_state_dict(state)
    x = torch.randn(2, 7, D)
    torch.testing.assert_close(sparse(x).hidden, dense(x))


def test_upcycled_parts_together_are_the_dense_layer() -> None:
    """Experts half as wide are the halves in turn; all of them with weights 1/4 are half the sum of two copies."""
    dense = MLP(D, F)
    sparse = MoELayer(UniformRouter(E, k=E), GroupedMLP(E, D, F // 2)).eval()
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
    w = sparse.state_dict()["experts.w_out"]
    torch.testing.assert_close(merged["w_out.weight"], (0.75 * w[1] + 0.25 * w[2]).t())


@pytest.mark.parametrize("kind", ["mlp", "mlp with biases", "glu"])
def test_merge_makes_an_added_shared_branch_one_more_part(kind: str) -> None:
    """With all experts in the dense feed-forward the result is the layer's own, shared branch included."""
    bias, shared_width = kind == "mlp with biases", 10
    if kind == "glu":
        sparse = MoELayer(UniformRouter(E, k=E), GroupedGLU(E, D, F), shared=GLU(D, shared_width))
        dense: nn.Module = GLU(D, E * F + shared_width)
    else:
        bank, shared = GroupedMLP(E, D, F, bias=bias), MLP(D, shared_width, bias=bias)
        sparse = MoELayer(UniformRouter(E, k=E), bank, shared=shared)
        dense = MLP(D, E * F + shared_width, bias=bias)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.normal_()
    dense.load_state_dict(merge(sparse.state_dict(), sparse, dense))
    x = torch.randn(5, D)
    torch.testing.assert_close(dense(x), sparse.eval()(x).hidden, rtol=1e-4, atol=1e-4)


def test_merge_refuses_what_no_dense_feed_forward_holds() -> None:
    """A branch that is mixed, of another kind, or has no room; and a part of a layer that nobody knows."""

    class Sparse(nn.Module):
        def __init__(self, layer: MoELayer) -> None:
            super().__init__()
            self.ff = layer

    def merged(shared: nn.Module, width: int, mix: SoftmaxMix | None = None, *, bias: bool = False) -> None:
        bank = GroupedMLP(E, D, F, bias=bias)
        sparse, dense = Sparse(MoELayer(TopKRouter(D, E), bank, shared=shared, mix=mix)), nn.Module()
        dense.ff = MLP(D, width, bias=bias)
        merge(sparse.state_dict(), sparse, dense)

    merged(MLP(D, F), 2 * F)
    with pytest.raises(UserError, match=r"ff mixes its experts with a shared branch .*\(SoftmaxMix\)"):
        merged(MLP(D, F), 2 * F, SoftmaxMix(D))
    with pytest.raises(UserError, match=r"shared branch of ff must be MLP .* got GLU"):
        merged(GLU(D, F), 2 * F)
    with pytest.raises(UserError, match=r"activation 'gelu' .the experts' is 'relu'"):
        merged(MLP(D, F, activation="gelu"), 2 * F)
    with pytest.raises(UserError, match=r"shared branch of ff must be MLP .* got MLP with w_in"):
        merged(MLP(D, F), 2 * F, bias=True)
    with pytest.raises(UserError, match=r"in the place of ff must be 1 to 4 .*, and 12 wider for the shared .* got 12"):
        merged(MLP(D, F), F)
    for kind, bank in ((MLP, GroupedMLP(E, D, F, activation="silu")), (GLU, GroupedGLU(E, D, F, activation="silu"))):
        sparse, dense = MoELayer(TopKRouter(D, E), bank), kind(D, F, activation="relu")
        with pytest.raises(UserError, match=r"must have the activation of the experts, 'silu': got 'relu'"):
            merge(sparse.state_dict(), sparse, dense)
    with_more = MoELayer(TopKRouter(D, E), GroupedMLP(E, D, F))
    with_more.extra = nn.Linear(D, D)
    with pytest.raises(UserError, match=r"extra\.weight would be lost in the merge"):
        merge(with_more.state_dict(), with_more, MLP(D, F))


def test_upcycled_parts_share_the_output_bias() -> None:
    """Parts with weight 1 add up to the dense layer; a part's bias then has the whole gradient, so its whole moment."""
    dense = MLP(D, F, bias=True)
    with torch.no_grad():
        dense.get_parameter("w_out.bias").normal_()
    sparse = MoELayer(UniformRouter(3, k=3), GroupedMLP(3, D, F // 3, bias=True))
    sparse.load_state_dict(upcycle(dense.state_dict(), sparse))
    x = torch.randn(5, D)
    sum_of_parts = torch.stack([sparse.experts.reference(e, x) for e in range(3)]).sum(0)
    torch.testing.assert_close(sum_of_parts, dense(x))
    for output in (dense(x), sum_of_parts):
        (output**2).sum().backward()
    moments = upcycle({name: p.grad for name, p in dense.named_parameters() if p.grad is not None}, sparse, power=-1)
    for name, parameter in sparse.experts.named_parameters():
        torch.testing.assert_close(moments[f"experts.{name}"], parameter.grad)


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
        coarse.get_parameter("experts.b_out").normal_()
    fine.load_state_dict(split_experts(coarse.state_dict(), sparse_layers(coarse), 3, divided=False))
    x = torch.randn(7, D)
    torch.testing.assert_close(fine(x).hidden, coarse(x).hidden)


@pytest.mark.parametrize("gated", [False, True])
def test_moments_of_a_split_are_those_of_the_parts_gradients(gated: bool) -> None:
    """What `power` promises: transformed gradients equal the gradients of the transformed model."""

    def layer(parts: int) -> MoELayer:
        router, sizes = TopKRouter(D, E * parts, 2 * parts, init_scale=1.0), (E * parts, D, F // parts)
        return MoELayer(router, GroupedGLU(*sizes, hidden_bias="add") if gated else GroupedMLP(*sizes, bias=True))

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


@pytest.mark.parametrize("divided", [False, True])
def test_moments_of_gate_rows_are_what_parts_have_on_average(divided: bool) -> None:
    """The gradients of the rows of an expert's parts sum to the gradient of its row, whatever weight a part has."""

    def layer(parts: int) -> MoELayer:
        router: Router = LossFreeRouter(D, E * parts, 2 * parts, init_scale=5.0)
        if divided:
            router = TopKRouter(D, E * parts, 2 * parts, init_scale=5.0)
        return MoELayer(router, GroupedMLP(E * parts, D, F // parts))

    coarse, fine, x = layer(1), layer(2), torch.randn(7, D)
    layers = sparse_layers(coarse)
    fine.load_state_dict(split_experts(coarse.state_dict(), layers, 2, divided=divided))
    for model in (coarse, fine):
        (model(x).hidden ** 2).sum().backward()
    row = coarse.get_parameter("router.weight").grad
    assert row is not None
    carried = split_experts({"router.weight": row}, layers, 2, divided=divided, power=-1)["router.weight"]
    found = fine.get_parameter("router.weight").grad
    assert found is not None
    torch.testing.assert_close(carried.view(E, 2, D).sum(1), found.view(E, 2, D).sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(carried, row.repeat_interleave(2, 0) / 2)
    second = split_experts({"router.weight": row**2}, layers, 2, divided=divided, power=-2)["router.weight"]
    torch.testing.assert_close(second, row.repeat_interleave(2, 0) ** 2 / 4)


# -- tables --------------------------------------------------------------------------------------------------------


def test_keys_of_experts_left_out_are_dealt_to_the_others() -> None:
    layer = with_experts(HashRouter(E, torch.tensor([3, 0, 1, 2, 1, 2, 0, 1, 1, 3, 2, 0, 0, 1, 2, 3])))
    pruned = take_experts(layer.state_dict(), sparse_layers(layer), {"": torch.tensor([0, 3])})
    #                                            0 stays 0, 3 becomes 1, and 1 and 2 are dealt: 0, 1, 0, 1, ...
    assert pruned["router.table"].flatten().tolist() == [1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1]


def test_aggregated_tables_take_turns() -> None:
    one, two = (with_experts(HashRouter(E, torch.full((6,), expert))) for expert in (1, 2))
    both = aggregate([one.state_dict(), two.state_dict()], [sparse_layers(one), sparse_layers(two)])
    assert both["router.table"].flatten().tolist() == [1, E + 2] * 3


def test_growing_deals_keys_to_the_copies() -> None:
    layer = with_experts(HashRouter(E, TABLE))
    grown = take_experts(layer.state_dict(), sparse_layers(layer), {"": torch.arange(2 * E) % E})
    table = grown["router.table"].flatten()
    assert torch.equal(table % E, TABLE)
    assert table.bincount().tolist() == [2] * (2 * E)


# -- what cannot be done -------------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused() -> None:
    dense = network(num_experts=0)
    with pytest.raises(UserError, match="model 0 must have sparse layers: it is a dense model"):
        aggregate([dense.state_dict()] * 2, [sparse_layers(dense)] * 2)


def test_banks_that_are_not_all_alike_are_refused() -> None:
    mixed = ZeroComputationExperts(GroupedMLP(2, D, F), zero=1, copy=1, constant=0)
    layer = MoELayer(TopKRouter(D, 4), mixed)
    with pytest.raises(UserError, match="does not count all 4 experts"):
        take_experts(layer.state_dict(), sparse_layers(layer), {"": torch.arange(2)})
    tables = torch.stack([TABLE, TABLE.flip(0)])
    hashed = MoELayer(HashRouter(E, tables), MultiHashMLP(E, D, F))
    with pytest.raises(UserError, match="HashRouter does not say"):
        take_experts(hashed.state_dict(), sparse_layers(hashed), {"": torch.arange(2)})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, "keep at most 4 experts of decoder.layers.1.feed_forward, it has no more: got keep=5"),
        (1, "keep at least 2 experts of decoder.layers.1.feed_forward, a token chooses as many: got keep=1"),
        (0, "above 0 and up to 1.0: got 0"),
        (1.5, "above 0 and up to 1.0: got 1.5"),
        (-0.5, "above 0"),
    ],
)
def test_wrong_numbers_to_keep(keep: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_experts(sparse_layers(network()), keep, "random")


def test_choices_by_load() -> None:
    layers = sparse_layers(network())
    load = dict.fromkeys(layers, torch.tensor([0.1, 0.4, 0.4, 0.1]))
    for keep, order, expected in (
        (2, "utilisation", [1, 2]),
        (3, "utilisation", [0, 1, 2]),  # of equal ones the first
        (2, "reversed", [0, 3]),
        (0.6, "reversed", [0, 3]),  # 2.4
        (0.65, "reversed", [0, 1, 3]),  # 2.6
        (0.1, "utilisation", [1, 2]),  # as many as a token chooses
        (1.0, "reversed", [0, 1, 2, 3]),
    ):
        kept = choose_experts(layers, keep, order, load=load)  # type: ignore[arg-type]
        assert all(numbers.tolist() == expected for numbers in kept.values()), (keep, order)
    draws = {tuple(next(iter(choose_experts(layers, 2, "random", seed=n).values())).tolist()) for n in range(30)}
    assert len(draws) == 6
    with pytest.raises(UserError, match="needs a load of its 4: got one of shape"):
        choose_experts(layers, 2, load=dict.fromkeys(layers, torch.ones(3)))


def test_models_of_other_shapes_are_refused_by_name_and_key() -> None:
    one = network()
    for other, message in (
        (network(hidden=2 * F), r"b\.ckpt: decoder\.layers\.1\..*\.w_in must have the shape .* a\.ckpt"),
        (network(k=1), r"b\.ckpt: .* must be of the kind"),
        (network(bias=False), r"b\.ckpt lacks .*b_in, which a\.ckpt has"),
    ):
        states, layers = [m.state_dict() for m in (one, other)], [sparse_layers(m) for m in (one, other)]
        with pytest.raises(UserError, match=message):
            aggregate(states, layers, names=["a.ckpt", "b.ckpt"])


def test_splits_and_merges_that_do_not_come_out_even() -> None:
    model = network()
    with pytest.raises(UserError, match="12 hidden units, which must be divisible by the number of parts: got 5"):
        split_experts(model.state_dict(), sparse_layers(model), 5)
    hashed = with_experts(HashRouter(E, TABLE))
    with pytest.raises(UserError, match="cannot be split: HashRouter names one expert for each key"):
        split_experts(hashed.state_dict(), sparse_layers(hashed), 2)
    with pytest.raises(UserError, match="must be 1 to 4 experts wide, each of 12 hidden units: got 18"):
        merge(model.state_dict(), model, network(num_experts=0, hidden=18))
    with pytest.raises(UserError, match=r"w_in holds 4 experts of shape \(8, 12\): a dense tensor of shape \(8, 36\)"):
        upcycle(network(num_experts=0, hidden=36).state_dict(), model)
    with pytest.raises(UserError, match="not all 0"):
        merge(model.state_dict(), model, network(num_experts=0), load={})
