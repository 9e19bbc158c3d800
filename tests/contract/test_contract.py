"""Every router, expert bank and dispatcher of the package through the public contract suite.

Classes are found by walking the package; one without an example below fails the test of its kind.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moekit
from moekit import dispatch, experts, routers
from moekit.experts import (
    BASELayerStack,
    ClampedGate,
    Experts,
    GateUpExperts,
    GroupedGLU,
    GroupedMLP,
    MultiHashMLP,
    ZeroComputationExperts,
)
from moekit.functional.hash_tables import random_table
from moekit.huggingface.expert_modules import ModuleExperts
from moekit.huggingface.sparse_blocks import CorrectionBiasRouter
from moekit.routers import (
    Balance,
    BASELayerRouter,
    BiasedLinearScorer,
    Bigram,
    CosineRouter,
    CosineScorer,
    ExpertChoiceRouter,
    HashRouter,
    InputDropout,
    InputJitter,
    NoTokenLeftBehind,
    RandomChoice,
    RankShuffle,
    SampledChoice,
    SampledSoftmax,
    SinkhornRouter,
    SparseMixerRouter,
    TaskRouter,
    TaskScorer,
    TaskTableRouter,
    ThresholdChoice,
    TokenPosition,
    TopKRouter,
    UniformRouter,
    presets,
)
from moekit.routers.dense_to_sparse import DenseToSparseRouter, LinearDecay, dense_to_sparse
from moekit.routers.hierarchical import HierarchicalRouter
from moekit.routers.loss_free import GroupLimit, LossFreeRouter, deepseek_v3, loss_free
from moekit.routers.noisy_topk import NoisyTopKRouter, noisy_topk
from moekit.routers.relu import AdaptiveCoefficient, ReLURouter, remoe
from moekit.routing import Capacity, Router
from moekit.testing import DISPATCHER_CHECKS, EXPERTS_CHECKS, ROUTER_CHECKS, skewed_tokens

D, E = 8, 4
# What hash tables are made of; not in the examples, which are also built on the meta device.
COUNTS, EMBEDDINGS = torch.arange(16) ** 2, skewed_tokens(16, 5)

# Several examples of a class, one for each way through its code; presets by their name.
ROUTERS: dict[str, Callable[[], Router]] = {
    "TopKRouter": lambda: TopKRouter(D, E, init_scale=1.0),
    "TopKRouter, three choices, sharing what survives": lambda: TopKRouter(
        D,
        E,
        3,
        capacity=Capacity(train=0.6, eval=0.8, minimum=1),
        renormalise="after_drop",
        second_expert=RandomChoice(0.5),
        balance=Balance(count="all", when="after_drop", scope="sequence"),
        init_scale=1.0,
    ),
    "TopKRouter, all choices": lambda: TopKRouter(
        D, E, E, renormalise="before_drop", exploration=InputJitter(0.1), balance=Balance(count="all", scope="global")
    ),
    "TopKRouter, one expert": lambda: TopKRouter(D, 1, capacity=Capacity(train=0.5, priority="random")),
    "TopKRouter, more experts than are counted one-hot": lambda: TopKRouter(D, 40, 2, init_scale=1.0),
    "TopKRouter, no token left behind": lambda: TopKRouter(
        D,
        E,
        2,
        capacity=Capacity(train=0.6, eval=0.8, minimum=1, priority="random"),
        overflow=NoTokenLeftBehind(),
        balance=Balance(when="after_drop"),
        init_scale=1.0,
    ),
    "TopKRouter, no token left behind, one expert": lambda: TopKRouter(
        D, 1, capacity=Capacity(train=0.5, minimum=1), overflow=NoTokenLeftBehind(rounds=2)
    ),
    "TopKRouter, sampled softmax": lambda: TopKRouter(D, E, 2, exploration=SampledSoftmax(), init_scale=1.0),
    "TopKRouter, sampled choices, input dropout": lambda: TopKRouter(
        D,
        E,
        3,
        capacity=Capacity(train=0.8),
        second_expert=SampledChoice(),
        exploration=InputDropout(0.2),
        init_scale=1.0,
    ),
    "TopKRouter, threshold": lambda: TopKRouter(D, E, 2, second_expert=ThresholdChoice(0.2), init_scale=1.0),
    "CosineRouter": lambda: CosineRouter(D, E),
    "CosineRouter, two choices, capacity": lambda: CosineRouter(
        D, E, 2, projected_dim=3, capacity=Capacity(train=0.7), renormalise="after_drop", exploration=InputJitter()
    ),
    "TopKRouter, scores of tasks, two choices": lambda: TopKRouter(D, E, 2, scorer=TaskScorer(3)),
    "ExpertChoiceRouter, cosines": lambda: ExpertChoiceRouter(D, E, scorer=CosineScorer(3)),
    "SinkhornRouter, cosines": lambda: SinkhornRouter(D, E, 2, scorer=CosineScorer(3)),
    "DenseToSparseRouter, cosines": lambda: DenseToSparseRouter(
        D, E, LinearDecay(1.0, 0.3, 5), scorer=CosineScorer(3), threshold=0.2
    ),
    "LossFreeRouter, scores of tasks": lambda: LossFreeRouter(D, E, 2, scorer=TaskScorer(3)),
    "ReLURouter, cosines": lambda: ReLURouter(D, E, 1.5, scorer=CosineScorer(3)),
    "ExpertChoiceRouter": lambda: ExpertChoiceRouter(D, E, init_scale=1.0),
    "ExpertChoiceRouter, less than one": lambda: ExpertChoiceRouter(
        D, E, capacity_factor=0.5, eval_capacity_factor=3.0
    ),
    "SinkhornRouter": lambda: SinkhornRouter(D, E, init_scale=1.0),
    "SinkhornRouter, two choices, sigmoid, capacity": lambda: SinkhornRouter(
        D, E, 2, activation="sigmoid", capacity=Capacity(train=0.9), iterations=8
    ),
    "TaskRouter": lambda: TaskRouter(D, E, num_tasks=3),
    "TaskRouter, two choices, capacity": lambda: TaskRouter(
        D, E, 2, num_tasks=5, capacity=Capacity(train=1.0), renormalise="before_drop", second_expert=RandomChoice(0.5)
    ),
    "TaskTableRouter": lambda: TaskTableRouter(E, [2, 0, 2]),
    "TaskTableRouter, capacity": lambda: TaskTableRouter(E, [3, 1], capacity=Capacity(train=0.5)),
    "UniformRouter": lambda: UniformRouter(E),
    "UniformRouter, two, random, capacity": lambda: UniformRouter(
        E, 2, order="random", capacity=Capacity(train=1.0, priority="random")
    ),
    "NoisyTopKRouter": lambda: NoisyTopKRouter(D, E, 2),
    "NoisyTopKRouter, capacity": lambda: NoisyTopKRouter(
        D, E, 3, capacity=Capacity(train=0.7, eval=0.7, priority="probability")
    ),
    "noisy_topk": lambda: noisy_topk(D, E),
    "BASELayerRouter": lambda: BASELayerRouter(D, E, init_gain=1.0),
    "BASELayerRouter, more experts than tokens, shuffle": lambda: BASELayerRouter(
        D, 60, init_gain=1.0, shuffle=RankShuffle()
    ),
    "BASELayerRouter, one expert": lambda: BASELayerRouter(D, 1),
    "base_layers": lambda: routers.base_layers(D, E),
    "HashRouter, position, one expert": lambda: HashRouter(1, random_table(64, 1), key=TokenPosition(64)),
    "HashRouter, bigrams, capacity": lambda: HashRouter(
        E,
        random_table(50, E),
        key=Bigram(16, buckets=50),
        capacity=Capacity(train=0.6, minimum=1, priority="random"),
    ),
    "hash_layers": lambda: routers.hash_layers(E, COUNTS),
    "hash_random": lambda: routers.hash_random(E, 16),
    "hash_previous": lambda: routers.hash_previous(E, COUNTS),
    "hash_bigram": lambda: routers.hash_bigram(E, 16),
    "hash_position": lambda: routers.hash_position(E, 64),
    "hash_clustered": lambda: routers.hash_clustered(E, EMBEDDINGS),
    "hash_dispersed": lambda: routers.hash_dispersed(E, EMBEDDINGS),
    "hash_oracle": lambda: routers.hash_oracle(E, COUNTS),
    "multi_hash": lambda: routers.multi_hash(3, COUNTS, num_tables=3, capacity=Capacity(train=1.0)),
    "HierarchicalRouter": lambda: HierarchicalRouter(D, 3, 4),
    "DenseToSparseRouter": lambda: DenseToSparseRouter(
        D, E, LinearDecay(1.0, 0.3, 5), threshold=0.2, weights="plain", init_scale=1.0
    ),
    "dense_to_sparse": lambda: dense_to_sparse(D, E),
    "LossFreeRouter": lambda: LossFreeRouter(D, E, 2, init_scale=1.0),
    "CorrectionBiasRouter": lambda: CorrectionBiasRouter(D, E, 2, init_scale=1.0),
    "SparseMixerRouter": lambda: SparseMixerRouter(D, E, init_scale=1.0),
    "SparseMixerRouter, three choices of many that are near, capacity": lambda: SparseMixerRouter(
        D, E, 3, tolerance=1.0, scorer=BiasedLinearScorer(1.0), capacity=Capacity(train=0.6, eval=0.8, minimum=1)
    ),
    "LossFreeRouter, softmax, global balance, capacity": lambda: LossFreeRouter(
        D,
        E,
        2,
        score="softmax",
        balance=Balance(when="after_drop", scope="global"),
        capacity=Capacity(train=0.6),
        init_scale=1.0,
    ),
    "loss_free": lambda: loss_free(D, E),
    "deepseek_v3": lambda: deepseek_v3(D, 2 * E, k=3, groups=GroupLimit(4, 2)),
    "ReLURouter": lambda: ReLURouter(D, E, 1.5, coefficient=AdaptiveCoefficient(0.6, start=1.0), init_scale=1.0),
    "remoe": lambda: remoe(D, E),
    "switch": lambda: presets.switch(D, E),
    "gshard": lambda: presets.gshard(D, E),
    "gshard, local groups": lambda: presets.gshard(D, E, capacity_factor=0.6, group_size=7),
    "st_moe": lambda: presets.st_moe(D, E),
    "st_moe, batch prioritised": lambda: presets.st_moe(D, E, capacity_factor=0.7, batch_prioritised=True),
    "zcode_m3": lambda: presets.zcode_m3(D, E),
    "zcode_m3, tight in both phases": lambda: presets.zcode_m3(D, E, capacity_factor=0.5, eval_capacity_factor=0.5),
}
EXPERTS: dict[str, Callable[[], Experts]] = {
    "GroupedMLP": lambda: GroupedMLP(E, D, 6),
    "GroupedMLP, gelu, biases, dropout": lambda: GroupedMLP(E, D, 6, activation="gelu", bias=True, dropout=0.2),
    "GroupedMLP, one expert": lambda: GroupedMLP(1, D, 5, activation="silu"),
    "BASELayerStack": lambda: BASELayerStack(E, D, 6),
    "BASELayerStack, three blocks that do something": lambda: BASELayerStack(
        E, D, 6, num_layers=3, activation="gelu", output_scale=1.0
    ),
    "BASELayerStack, no biases": lambda: BASELayerStack(2, D, 5, num_layers=2, bias=False, output_scale=1.0),
    "MultiHashMLP": lambda: MultiHashMLP(E, D, 6, num_segments=2),
    "MultiHashMLP, gelu, dropout": lambda: MultiHashMLP(2, D, 6, num_segments=3, activation="gelu", dropout=0.2),
    "GroupedGLU": lambda: GroupedGLU(E, D, 6),
    "GroupedGLU, silu, dropout": lambda: GroupedGLU(3, D, 5, activation="silu", dropout=0.2),
    "GroupedGLU, additive bias": lambda: GroupedGLU(E, D, 6, hidden_bias="add"),
    "GroupedGLU, multiplicative bias": lambda: GroupedGLU(E, D, 6, hidden_bias="multiply"),
    "GateUpExperts": lambda: GateUpExperts(E, D, 6),
    "GateUpExperts, clamped gate, biases, inputs first": lambda: GateUpExperts(
        E, D, 6, gate=ClampedGate(limit=0.5), bias=True, outputs_first=False
    ),
    "ModuleExperts, an activation that is a module, output dropout": lambda: ModuleExperts(
        E, D, 6, activation=nn.Tanh(), dropout=0.2, bias=True, layer_names=("fc1", "fc2"), output_dropout=0.3
    ),
    "ZeroComputationExperts": lambda: ZeroComputationExperts(GroupedMLP(3, D, 6, init_scale=1.0)),
    "ZeroComputationExperts, no constant": lambda: ZeroComputationExperts(GroupedGLU(2, D, 6), copy=0, constant=0),
}
DISPATCHERS: dict[str, Callable[[], dispatch.Dispatcher]] = {
    "PackedDispatcher": dispatch.PackedDispatcher,
    "PaddedDispatcher": dispatch.PaddedDispatcher,
}


def walk() -> Iterator[Any]:
    """Every module of the package below the recipes, imported."""
    for found in pkgutil.walk_packages(moekit.__path__, "moekit."):
        if "__main__" not in found.name and not found.name.startswith("moekit.recipes"):
            yield importlib.import_module(found.name)


def subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


def concrete(base: type) -> set[str]:
    """Names of the concrete subclasses of `base` that the package defines."""
    list(walk())
    return {
        cls.__name__ for cls in subclasses(base) if cls.__module__.startswith("moekit.") and not inspect.isabstract(cls)
    }


def builds(function: Callable[..., object], base: type) -> bool:
    """Whether the function says that it returns a `base`."""
    result = typing.get_type_hints(function).get("return")
    return isinstance(result, type) and issubclass(result, base)


def exemplified(examples: dict[str, Any]) -> set[str]:
    return {name.partition(",")[0] for name in examples}


def router_cases() -> Iterator[Any]:
    """Every example by every check; compiling takes a second, so among the fast tests once for each class or preset."""
    seen: set[str] = set()
    for name in ROUTERS:
        kind = name.partition(",")[0]
        for check in ROUTER_CHECKS:
            slow = check.__name__ == "check_compiles" and kind in seen
            yield pytest.param(name, check, id=f"{name}-{check.__name__}", marks=[pytest.mark.slow] if slow else [])
        seen.add(kind)


@pytest.mark.parametrize(("name", "check"), router_cases())
def test_router(name: str, check: Callable[[Callable[[], Router]], None]) -> None:
    check(ROUTERS[name])


@pytest.mark.parametrize("check", EXPERTS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, check: Callable[[Callable[[], Experts]], None]) -> None:
    check(EXPERTS[name])


@pytest.mark.parametrize("check", DISPATCHER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_dispatcher(name: str, check: Callable[[Callable[[], dispatch.Dispatcher]], None]) -> None:
    check(DISPATCHERS[name])


def test_every_router_has_an_example() -> None:
    found = concrete(Router)
    assert "TopKRouter" in found
    found -= {"ReplayRouter"}  # plays one trace, forward by forward: tests/routing_traces
    assert found <= exemplified(ROUTERS), "add an example of each to ROUTERS, so that the contract runs on it"


def test_every_preset_has_an_example() -> None:
    """Functions of a router module that build a router."""
    found = {
        name
        for module in walk()
        if module.__name__.startswith("moekit.routers")
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__.startswith("moekit.routers") and not name.startswith("_") and builds(function, Router)
    }
    assert {"switch", "gshard", "st_moe", "zcode_m3"} <= found
    assert found <= exemplified(ROUTERS), "add an example of each to ROUTERS, so that the contract runs on it"
    for name in found:
        assert "Source:" in (inspect.getdoc(getattr(routers, name)) or ""), f"{name} does not cite its source"


def test_every_bank_has_an_example() -> None:
    found = concrete(Experts)
    assert {"GroupedMLP", "GroupedGLU"} <= found
    assert found <= exemplified(EXPERTS), "add an example of each to EXPERTS, so that the contract runs on it"
    public = {name: getattr(experts, name) for name in experts.__all__}
    banks = {name for name, value in public.items() if inspect.isclass(value) and issubclass(value, Experts)}
    assert banks - {"Experts"} <= exemplified(EXPERTS)


def test_every_dispatcher_has_an_example() -> None:
    found = {
        cls.__name__
        for module in walk()
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__.startswith("moekit.")
        and hasattr(cls, "dispatch")
        and hasattr(cls, "combine")
        and not inspect.isabstract(cls)
        and not getattr(cls, "_is_protocol", False)
    }
    assert {"PackedDispatcher", "PaddedDispatcher"} <= found
    assert found <= exemplified(DISPATCHERS), "add an example of each to DISPATCHERS, so that the contract runs on it"
