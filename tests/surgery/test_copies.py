"""Experts that are there several times: an aggregate of a model with itself is that model, whatever its router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.errors import UserError
from moekit.experts import BASELayerStack, DensePretraining, GroupedGLU, GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import (
    BASELayerRouter,
    CosineRouter,
    DenseToSparseRouter,
    ExpertChoiceRouter,
    ExponentialDecay,
    GroupLimit,
    HashRouter,
    HierarchicalRouter,
    LossFreeRouter,
    NoisyTopKRouter,
    ReLURouter,
    SinkhornRouter,
    TaskRouter,
    TaskTableRouter,
    ThresholdChoice,
    TopKRouter,
    UniformRouter,
    gshard,
    routing_of_choices,
    st_moe,
    switch,
    zcode_m3,
)
from moekit.routing import Compensation, Router, Routing, RoutingContext
from moekit.soft_moe import SoftMoELayer
from moekit.surgery import aggregate, compensate, compensations, sparse_layers, split_experts, take_experts
from moekit.testing.cases import some_context

D, F, E = 8, 12, 4
Make = Callable[[int, int], nn.Module]
"""A layer by its number of experts and by how many times as many choices it has."""


def layer(router: Router, **options: Any) -> MoELayer:
    return MoELayer(router, GroupedMLP(router.num_experts, D, F, bias=True), **options)


def hard(e: int) -> Router:
    return DenseToSparseRouter(D, e, ExponentialDecay(1.0, 0.5, 10), hard_from=0, init_scale=1.0)


TABLE = torch.arange(16) % E
ROUTERS: dict[str, Make] = {
    "top-1": lambda e, n: layer(TopKRouter(D, e, init_scale=1.0)),
    "switch": lambda e, n: layer(switch(D, e)),
    "zcode_m3": lambda e, n: layer(zcode_m3(D, e)),
    "top-2 of a softmax": lambda e, n: layer(TopKRouter(D, e, 2 * n, init_scale=1.0)),
    "top-2 before drop": lambda e, n: layer(TopKRouter(D, e, 2 * n, renormalise="before_drop", init_scale=1.0)),
    "top-2 after drop": lambda e, n: layer(TopKRouter(D, e, 2 * n, renormalise="after_drop", init_scale=1.0)),
    "cosine": lambda e, n: MoELayer(CosineRouter(D, e, projected_dim=8), GroupedGLU(e, D, F, hidden_bias="add")),
    "task": lambda e, n: layer(TaskRouter(D, e, 2 * n, num_tasks=3)),
    "task table": lambda e, n: layer(TaskTableRouter(e, table=[3, 0, 2, 1, 1])),
    "hash": lambda e, n: layer(HashRouter(e, TABLE)),
    "uniform": lambda e, n: layer(UniformRouter(e, 2)),
    "loss-free": lambda e, n: layer(LossFreeRouter(D, e, 2 * n, init_scale=1.0)),
    "loss-free of one": lambda e, n: layer(LossFreeRouter(D, e, 1, init_scale=1.0)),
    "loss-free of one, softmax": lambda e, n: layer(LossFreeRouter(D, e, 1, score="softmax", init_scale=1.0)),
    "deepseek": lambda e, n: layer(LossFreeRouter(D, e, 2 * n, renormalise=True, scaling_factor=2.5, init_scale=1.0)),
    "noisy": lambda e, n: layer(NoisyTopKRouter(D, e, 2 * n)),
    "relu": lambda e, n: layer(ReLURouter(D, e, 1.5 * n, init_scale=1.0)),
    "sinkhorn": lambda e, n: layer(SinkhornRouter(D, e, 2 * n, init_scale=1.0)),
    "sinkhorn, sigmoid": lambda e, n: layer(SinkhornRouter(D, e, 2 * n, activation="sigmoid", init_scale=1.0)),
    "sinkhorn of one": lambda e, n: layer(SinkhornRouter(D, e, init_scale=1.0)),
    "expert choice": lambda e, n: layer(ExpertChoiceRouter(D, e, capacity_factor=2.0 * n, init_scale=1.0)),
    "base": lambda e, n: MoELayer(BASELayerRouter(D, e), BASELayerStack(e, D, F, num_layers=2, output_scale=1.0)),
    "dense to sparse": lambda e, n: layer(hard(e)),
    "soft": lambda e, n: SoftMoELayer(GroupedMLP(e, D, F), slots=3),
    "beside a shared branch": lambda e, n: layer(TopKRouter(D, e, init_scale=1.0), shared=nn.Linear(D, D)),
}  # fmt: skip


def stirred(make: Make) -> nn.Module:
    torch.manual_seed(1)
    made = make(E, 1).eval()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    return made


def filled(make: Make, state: dict[str, Tensor], num_experts: int, times: int) -> nn.Module:
    made = make(num_experts, times).eval()
    made.load_state_dict(state)
    return made


def output(made: nn.Module) -> Tensor:
    torch.manual_seed(2)
    x = torch.randn(2, 8, D)
    with torch.no_grad():
        hidden: Tensor = made(x, some_context(getattr(made, "router", made), 16)).hidden
    return hidden


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_aggregated_with_itself_it_is_itself(name: str, n: int) -> None:
    one = stirred(ROUTERS[name])
    layers = sparse_layers(one)
    state = aggregate([one.state_dict()] * n, [layers] * n)
    many = filled(ROUTERS[name], state, n * E, n)
    torch.testing.assert_close(output(many), output(one))
    if name in ("hash", "task table"):
        return  # whose keys of experts left out are dealt to those that stay
    # And back: the experts of the first, of as many as it had.
    few = compensate(take_experts(state, sparse_layers(many), {"": torch.arange(E)}), sparse_layers(many), 1 / n)
    torch.testing.assert_close(output(filled(ROUTERS[name], few, E, 1)), output(one))


@pytest.mark.parametrize("name", ROUTERS)
def test_growing_by_whole_copies_keeps_the_function(name: str) -> None:
    one = stirred(ROUTERS[name])
    layers = sparse_layers(one)
    grown = compensate(take_experts(one.state_dict(), layers, {"": torch.arange(2 * E) % E}), layers, 2)
    torch.testing.assert_close(output(filled(ROUTERS[name], grown, 2 * E, 2)), output(one))


@pytest.mark.parametrize(("name", "times"), [("top-1", 1), ("loss-free", 2), ("relu", 2), ("dense to sparse", 1)])
def test_the_plain_form_is_another_function(name: str, times: int) -> None:
    """Under one softmax a top-1 weight halves; of own scores there are twice as many."""
    one = stirred(ROUTERS[name])
    state = aggregate([one.state_dict()] * 2, [sparse_layers(one)] * 2, compensate=False)
    factor = 2.0 if name in ("loss-free", "relu") else 0.5
    torch.testing.assert_close(output(filled(ROUTERS[name], state, 2 * E, times)), factor * output(one))


def test_two_choices_need_four() -> None:
    """With as many choices as before both are the best expert: no scale brings the second one back."""
    make = ROUTERS["top-2 before drop"]
    one = stirred(make)
    state = aggregate([one.state_dict()] * 2, [sparse_layers(one)] * 2)
    same, found = output(one), output(filled(make, state, 2 * E, 1))
    best = (found * same).sum() / (found * found).sum()
    assert (best * found - same).norm() > 0.1 * same.norm()


def test_models_of_unequal_size_lose_by_what_they_are_of_the_whole() -> None:
    """Of 4 + 12 experts with equal scores, weights shrink to a quarter and to three quarters."""
    few, many = (layer(TopKRouter(D, e)) for e in (E, 3 * E))
    state = aggregate([few.state_dict(), many.state_dict()], [sparse_layers(few), sparse_layers(many)])
    for name in ("w_out", "b_out"):
        assert torch.equal(state[f"experts.{name}"][:E], 4 * few.get_parameter(f"experts.{name}"))
        torch.testing.assert_close(state[f"experts.{name}"][E:], 4 / 3 * many.get_parameter(f"experts.{name}"))
    assert torch.equal(state["experts.w_in"][:E], few.get_parameter("experts.w_in"))


@pytest.mark.parametrize("name", ["top-1", "relu", "loss-free", "top-2 before drop", "noisy"])
def test_moments_are_those_of_the_gradients_then(name: str) -> None:
    """What `power` promises: transformed gradients equal those of the aggregate, over all copies that are used."""
    one = stirred(ROUTERS[name])
    layers = sparse_layers(one)
    state = aggregate([one.state_dict()] * 2, [layers] * 2)
    many = filled(ROUTERS[name], state, 2 * E, 2)
    torch.manual_seed(2)
    x = torch.randn(2, 8, D)
    for made in (one, many):
        (made(x).hidden ** 2).sum().backward()
    gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    expected = aggregate([gradients] * 2, [layers] * 2, power=-1)
    used = 1 if name == "top-1" else 2  # of equal experts top-1 takes the first
    for key in layers[""].dims:
        if key not in gradients or ("router" in key and name == "top-1"):
            continue
        gradient = many.get_parameter(key).grad
        assert gradient is not None
        torch.testing.assert_close(gradient.unflatten(0, (2, E)).sum(0), used * expected[key][:E])
    squares = aggregate([gradients] * 2, [layers] * 2, power=-2)
    factor = expected["experts.w_out"][:E].sum() / gradients["experts.w_out"].sum()
    torch.testing.assert_close(squares["experts.w_out"][:E], factor**2 * gradients["experts.w_out"])


class Silent(Router):
    """A router of somebody's own."""

    expert_dims = {"weight": 0}  # noqa: RUF012

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, D))

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        return routing_of_choices((x @ self.weight.t()).argmax(-1), torch.ones(x.shape[0]), self.num_experts)


class Telling(Silent):
    def compensation(self, copies: float, state: Any = None) -> Compensation:
        return Compensation()


def soft(step: int) -> MoELayer:
    made = layer(DenseToSparseRouter(D, E, ExponentialDecay(1.0, 0.5, 10), hard_from=10))
    made.router.on_step_end(step)
    return made


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a router that does not say": (lambda: layer(Silent(E)), "Silent does not say what copies of experts do"),
    "before the last phase": (lambda: soft(9), "its step is before hard_from=10"),
    "thresholds": (
        lambda: layer(TopKRouter(D, E, 2, second_expert=ThresholdChoice(0.2))), "ThresholdChoice compares weights"
    ),
    "groups": (lambda: layer(LossFreeRouter(D, E, 2, groups=GroupLimit(2, 1))), "GroupLimit would have to limit"),
    "a dense phase": (lambda: layer(TopKRouter(D, E), phase=DensePretraining(5)), "its dense phase is not over"),
    "deep experts": (
        lambda: MoELayer(TopKRouter(D, E), BASELayerStack(E, D, F)), "outputs of BASELayerStack cannot be scaled"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_where_nothing_makes_up_for_it_the_router_is_named(name: str) -> None:
    make, message = REFUSED[name]
    one = make()
    states, layers = [one.state_dict()] * 2, [sparse_layers(one)] * 2
    with pytest.raises(UserError, match=message):
        aggregate(states, layers)
    assert len(aggregate(states, layers, compensate=False)["experts.w_out"]) == 2 * E


def test_the_last_phase_and_routers_that_say_are_not_refused() -> None:
    for one in (soft(10), layer(Telling(E))):
        assert aggregate([one.state_dict()] * 2, [sparse_layers(one)] * 2)


def test_two_levels_are_refused_as_before() -> None:
    one = layer(HierarchicalRouter(D, 2, 2, k_groups=2, k_experts=2))
    with pytest.raises(UserError, match="HierarchicalRouter does not say which of its tensors count experts"):
        aggregate([one.state_dict()] * 2, [sparse_layers(one)] * 2)


@pytest.mark.parametrize("name", ["top-2 of a softmax", "loss-free", "deepseek", "noisy", "sinkhorn, sigmoid", "soft"])
def test_a_split_that_gets_another_share_is_refused(name: str) -> None:
    """What the router says of copies it says of parts: a wrong `divided` would change the function."""
    one = stirred(ROUTERS[name])
    whole = name in ("loss-free", "sinkhorn, sigmoid")
    layers = sparse_layers(one)
    assert split_experts(one.state_dict(), layers, 2, divided=not whole)
    with pytest.raises(UserError, match=r"gets the whole weight under" if whole else r"gets 1 / m of the weight under"):
        split_experts(one.state_dict(), layers, 2, divided=whole)


@pytest.mark.parametrize("preset", [gshard, st_moe])
def test_presets_of_two_choices(preset: Callable[..., Router]) -> None:
    assert compensations(sparse_layers(layer(preset(D, E))), 2)[""] == Compensation(choices=2)
