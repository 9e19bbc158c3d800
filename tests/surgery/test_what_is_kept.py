"""The table of docs/guides/surgery.md: what each operation keeps, exactly or up to a factor that is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import LossFreeRouter, NoisyTopKRouter, TopKRouter, UniformRouter
from moekit.routing import Router
from moekit.surgery import merge, sparse_layers, take_experts, upcycle
from moekit.transformer import MLP

D, F, E = 8, 12, 4
X = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
X[:, 0] = 1.0  # by which a score can be low for every token


def layer(router: Router, hidden: int = F) -> MoELayer:
    torch.manual_seed(3)
    made = MoELayer(router, GroupedMLP(router.num_experts, D, hidden, bias=True)).eval()
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if "b_" in name:
                tensor.normal_()
    return made


def filled(made: MoELayer, state: dict[str, Tensor]) -> MoELayer:
    made.load_state_dict(state)
    return made


def unused_last(made: MoELayer) -> MoELayer:
    """Nobody chooses the last expert, which has some probability all the same."""
    with torch.no_grad():
        weight = made.get_parameter("router.weight")
        weight.normal_()
        weight[-1] = weight[:-1].mean(0)
        weight[-1, 0] -= 6.0
    assert int(made(X).routing.expert.max()) < E - 1
    return made


# -- prune ---------------------------------------------------------------------------------------------------------

KEPT: dict[str, Callable[[int], Router]] = {
    "scaled to sum to 1": lambda e: TopKRouter(D, e, 2, renormalise="before_drop"),
    "softmax of the chosen": lambda e: NoisyTopKRouter(D, e, 2),
    "own scores": lambda e: LossFreeRouter(D, e, 2),
}


@pytest.mark.parametrize("name", KEPT)
def test_pruning_what_nobody_chooses_changes_nothing(name: str) -> None:
    whole = unused_last(layer(KEPT[name](E)))
    few = filled(
        layer(KEPT[name](E - 1)), take_experts(whole.state_dict(), sparse_layers(whole), {"": torch.arange(3)})
    )
    torch.testing.assert_close(few(X).hidden, whole(X).hidden)


def test_under_a_softmax_over_all_the_others_weights_grow() -> None:
    """By what the experts that went had of the probability: p becomes p / (1 - theirs)."""
    whole = unused_last(layer(TopKRouter(D, E)))
    state = take_experts(whole.state_dict(), sparse_layers(whole), {"": torch.arange(E - 1)})
    few = filled(layer(TopKRouter(D, E - 1)), state)
    theirs = (X @ whole.get_parameter("router.weight").t()).softmax(-1)[:, -1:]
    torch.testing.assert_close(few(X).hidden, whole(X).hidden / (1 - theirs))


# -- upcycle -------------------------------------------------------------------------------------------------------


def upcycled(router: Router, *, scale: float = 1.0, hidden: int = F) -> tuple[Tensor, Tensor, MoELayer]:
    torch.manual_seed(4)
    dense = MLP(D, F, bias=True)
    sparse = layer(router, hidden)
    filled(sparse, upcycle(dense.state_dict(), sparse, scale=scale))
    return sparse(X).hidden, dense(X), sparse


def test_weights_that_sum_to_one_keep_the_dense_model() -> None:
    for router in (TopKRouter(D, E, 2, renormalise="before_drop"), NoisyTopKRouter(D, E, 2), UniformRouter(E, 3)):
        found, dense, _ = upcycled(router)
        torch.testing.assert_close(found, dense)


def test_other_weights_multiply_the_dense_model() -> None:
    """By their sum: a top-1 probability, two sigmoids."""
    for router in (TopKRouter(D, E, init_scale=1.0), TopKRouter(D, E, 2), LossFreeRouter(D, E, 2)):
        found, dense, sparse = upcycled(router)
        routing = sparse(X).routing
        weight = torch.zeros(len(X)).index_add(0, routing.token, routing.weight)
        assert (weight - 1).abs().max() > 0.01
        torch.testing.assert_close(found, weight[:, None] * dense)


def test_scale_makes_up_for_a_router_that_starts_even() -> None:
    for k in (1, 2):
        found, dense, sparse = upcycled(TopKRouter(D, E, k), scale=E / k)
        with torch.no_grad():
            sparse.get_parameter("router.weight").zero_()
        torch.testing.assert_close(sparse(X).hidden, dense)
        torch.testing.assert_close(found, dense, rtol=0.5, atol=0.5)  # a fresh one is even up to its small draws


# -- merge ---------------------------------------------------------------------------------------------------------


def test_merging_equal_experts_keeps_what_weights_of_one_would() -> None:
    sparse = layer(TopKRouter(D, E, 2, renormalise="before_drop"))
    with torch.no_grad():
        for name in ("w_in", "b_in", "w_out", "b_out"):
            bank = sparse.get_parameter(f"experts.{name}")
            bank.copy_(bank[:1].expand_as(bank))
    dense = MLP(D, F, bias=True)
    dense.load_state_dict(merge(sparse.state_dict(), sparse, dense))
    torch.testing.assert_close(dense(X), sparse(X).hidden)
    single = layer(TopKRouter(D, E))
    state = {**single.state_dict(), **{n: t for n, t in sparse.state_dict().items() if n.startswith("experts.")}}
    filled(single, state)
    torch.testing.assert_close(single(X).hidden, single(X).routing.weight[:, None] * dense(X))


def test_merging_as_wide_as_all_experts_is_a_layer_of_equal_weights() -> None:
    sparse = layer(UniformRouter(E, E))
    dense = MLP(D, E * F, bias=True)
    dense.load_state_dict(merge(sparse.state_dict(), sparse, dense))
    torch.testing.assert_close(dense(X), sparse(X).hidden)
