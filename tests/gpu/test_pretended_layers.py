"""Routers, banks, dispatchers and layers on a GPU: the CPU's results, no fault, and the host seldom waits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import EVERY, PRECISIONS, autocast, examples, explained, gpu, moved
from torch import Tensor, nn

import moekit as mk
from moekit import experts, routers
from moekit.dispatch import AllToAll, PackedDispatcher, PaddedDispatcher, TwoLevelAllToAll
from moekit.experts.dense_pretraining import AddNoise, DensePretraining, MaskWeights
from moekit.mixing import ConditionalMix, ExpertOutputMasking, SoftmaxMix
from moekit.routing import Capacity, Router
from moekit.soft_moe import SoftMoELayer
from moekit.surgery.adapters import add_adapters
from moekit.testing import random_routing, seeded, skewed_tokens, some_context, some_mask
from moekit.testing.closeness import assert_same

ROUTERS, EXPERTS = examples("contract/test_contract.py", "ROUTERS", "EXPERTS")
T, D, E = 24, 8, 4
# What a router waits for by itself: lists whose length depends on data, a solver on the host, a loop with an end.
OWN_WAITS = {"ReLURouter": 1, "DenseToSparseRouter": 1, "BASELayerRouter": 1, "SinkhornRouter": 13}


def results(layer: mk.MoELayer, x: Tensor, context: Any, amp: torch.dtype | None, where: str, watch: Any) -> Any:
    """Output, routing and gradients of one pass, and where the host waited, forward and backward."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    with watch() as forward, autocast(amp, where):
        out = layer(x, context)
    objective = out.hidden.float().sin().sum() + sum(0.1 * loss for loss in out.routing.losses.values())
    with watch() as backward:
        if objective.requires_grad:
            objective.backward()
    layer.router.observe(out.routing)
    layer.router.on_step_end(1)
    found = {"output": out.hidden, "weight": out.routing.weight, "kept": out.routing.kept}
    found |= {f"loss {name}": loss for name, loss in out.routing.losses.items()}
    found |= {f"statistic {name}": value for name, value in out.routing.statistics.items()}
    leaves = {"x": x, **dict(layer.named_parameters())}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return out.routing, {name: value.detach().float() for name, value in found.items()}, forward, backward


def nobody() -> Any:
    """Watches nothing."""
    return contextlib.nullcontext(Counter())


def compare(
    layer: mk.MoELayer, device: str, precision: str, *, masked: bool | Tensor, own: int = 0, t: int = T, **options: Any
) -> tuple[int, int]:
    """The layer on both devices, on `t` tokens, some or those of a mask of them real.

    Returns:
        How often the host waited for the GPU, forward and backward.
    """
    dtype, amp = PRECISIONS[precision]
    layer = layer.to(dtype)
    x = skewed_tokens(t, D, dtype=dtype)
    mask = masked if isinstance(masked, Tensor) else some_mask(t) if masked else None
    context = some_context(layer.router, t, mask=mask)
    with seeded(1):
        _, wanted, _, _ = results(copy.deepcopy(layer), x, context, amp, "cpu", nobody)
    with gpu(device, **options) as found, seeded(1):
        routing, got, forward, backward = results(
            copy.deepcopy(layer).to("cuda"), x.to("cuda"), moved(context), amp, "cuda", found.watch
        )
        got = {name: value.cpu() for name, value in got.items()}
    if device == "pretended" and not (layer.training and drops(layer)):  # the same draws
        assert_same(_near(got), _near(wanted), f"on the GPU in {precision}")
    assert all(value.isfinite().all() for value in got.values())
    explained(forward)
    explained(backward)
    waits = sum(forward.values()), sum(backward.values())
    one_kernel = torch.bfloat16 in (dtype, amp) and options.get("capability", (9, 0))[0] in (9, 10)
    counted = 0 if routing.capacity is not None else 1 if not (routing.all_kept and one_kernel) else 0
    assert waits[0] <= counted + own, list(map(str, forward))
    assert waits[1] == 0, list(map(str, backward))
    return waits


def drops(layer: mk.MoELayer) -> bool:
    """Whether there is dropout, which a CPU draws otherwise."""
    exploration = getattr(layer.router, "exploration", None)
    return getattr(layer.experts, "dropout", 0.0) > 0 or isinstance(exploration, routers.InputDropout)


def _near(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """In bf16, where the tolerance is that of its rounding, unless it counts."""
    return {name: value if name == "kept" else value.bfloat16() for name, value in found.items()}


def _one_of_each(examples: Iterable[str]) -> Iterator[Any]:
    """The names of examples, of which the further ones of a class are slow tests."""
    for name in examples:
        yield pytest.param(name, marks=[pytest.mark.slow] if "," in name else [])


@EVERY
@pytest.mark.parametrize("name", list(_one_of_each(ROUTERS)))
def test_routers(name: str, device: str) -> None:
    """In both phases, with and without padding, in every precision."""
    with seeded(0):
        router: Router = ROUTERS[name]()
    bank = experts.GroupedMLP(router.num_experts, D, 16, activation="silu", bias=True, init_scale=1.0)
    layer = mk.MoELayer(router, bank)
    for precision in PRECISIONS:
        for training in (True, False):
            for masked in (True, False) if precision in ("float32", "bf16") else (True,):
                own = OWN_WAITS.get(type(router).__name__, 0)
                compare(copy.deepcopy(layer).train(training), device, precision, masked=masked, own=own)


BATCHES: dict[str, tuple[int, Tensor | None]] = {
    "no token": (0, None),
    "one token": (1, None),
    "one that is padding": (1, torch.zeros(1, dtype=torch.bool)),
    "nothing but padding": (T, torch.zeros(T, dtype=torch.bool)),
    "padding on the left": (T, torch.arange(T) % (T // 4) >= 2),
}
# Beside the examples: as many choices as experts, and a single expert.
EXTREMES: dict[str, Callable[[], Router]] = {
    "SinkhornRouter, all choices": lambda: routers.SinkhornRouter(D, E, E),
    "UniformRouter, all choices": lambda: routers.UniformRouter(E, E),
    "NoisyTopKRouter, all choices": lambda: routers.NoisyTopKRouter(D, E, E),
    "LossFreeRouter, all choices": lambda: routers.LossFreeRouter(D, E, E),
    "ReLURouter, all choices": lambda: routers.ReLURouter(D, E, E),
    "SinkhornRouter, one expert": lambda: routers.SinkhornRouter(D, 1),
    "UniformRouter, one expert": lambda: routers.UniformRouter(1),
    "ExpertChoiceRouter, one expert": lambda: routers.ExpertChoiceRouter(D, 1),
    "LossFreeRouter, one expert": lambda: routers.LossFreeRouter(D, 1, 1),
    "dense_to_sparse, one expert": lambda: routers.dense_to_sparse(D, 1),
    "remoe, one expert": lambda: routers.remoe(D, 1),
    "switch, one expert": lambda: routers.switch(D, 1),
    "zcode_m3, one expert": lambda: routers.zcode_m3(D, 1),
}


@EVERY
@pytest.mark.parametrize("name", [*_one_of_each(ROUTERS), *EXTREMES])
def test_odd_batches(name: str, device: str) -> None:
    """In both phases: the CPU's results, finite, and no more waits than with other batches."""
    with seeded(0):
        router: Router = {**ROUTERS, **EXTREMES}[name]()
    layer = mk.MoELayer(router, experts.GroupedMLP(router.num_experts, D, 16, bias=True, init_scale=1.0))
    for t, mask in BATCHES.values():
        for training in (True, False):
            own = OWN_WAITS.get(type(router).__name__, 0)
            masked = False if mask is None else mask
            compare(copy.deepcopy(layer).train(training), device, "float32", masked=masked, own=own, t=t)


@EVERY
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EXPERTS)
def test_banks(name: str, precision: str, device: str) -> None:
    """Packed and padded, trained and not, also where dim and hidden are no multiple of 8."""
    with seeded(0):
        bank = EXPERTS[name]()
    own = int(isinstance(bank, experts.ZeroComputationExperts))  # where the kinds of experts part
    for training in (True, False):
        for capacity in (None, Capacity(train=0.7, eval=0.7)):
            router = routers.TopKRouter(D, bank.num_experts, min(2, bank.num_experts), capacity=capacity)
            layer = mk.MoELayer(router, copy.deepcopy(bank)).train(training)
            for dispatcher in (None, PackedDispatcher()):
                layer.dispatcher = dispatcher
                if dispatcher is not None or capacity is None:
                    compare(layer, device, precision, masked=True, own=1 if capacity else own)
                else:
                    compare(layer, device, precision, masked=True)


def _with(**options: Any) -> mk.MoELayer:
    return mk.MoELayer(routers.TopKRouter(D, E, 2), experts.GroupedMLP(E, D, 16), **options)


def _adapted(rank: int, bank: Callable[[], experts.Experts]) -> mk.MoELayer:
    layer = mk.MoELayer(routers.TopKRouter(D, E, 2), bank())
    add_adapters(layer, rank=rank, targets=["experts"])
    for name, parameter in layer.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(parameter)
    return layer


LAYERS: dict[str, Callable[[], mk.MoELayer]] = {
    "shared": lambda: _with(shared=nn.Linear(D, D)),
    "softmax mix": lambda: _with(shared=nn.Linear(D, D), mix=SoftmaxMix(D)),
    "conditional mix": lambda: _with(shared=nn.Linear(D, D), mix=ConditionalMix(D, gate_dropout=0.3)),
    "output masking": lambda: _with(output_masking=ExpertOutputMasking(0.2)),
    "dense phase": lambda: _with(phase=DensePretraining(5)),
    "noise after it": lambda: _with(phase=DensePretraining(1, perturb=AddNoise())),
    "masks after it": lambda: _with(phase=DensePretraining(1, perturb=MaskWeights())),
    "adapters": lambda: _adapted(8, lambda: experts.GroupedGLU(E, D, 16)),
    "adapters of rank 4": lambda: _adapted(4, lambda: experts.GroupedMLP(E, D, 16)),
    "three choices, padded": lambda: mk.MoELayer(
        routers.TopKRouter(D, E, 3, capacity=Capacity(1.0, 1.0)), experts.GroupedMLP(E, D, 16)
    ),
}


@EVERY
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, precision: str, device: str) -> None:
    for training in (True, False):
        for masked in (True, False):
            with seeded(0):
                layer = LAYERS[name]().train(training)
            compare(layer, device, precision, masked=masked)


def test_the_dense_phase_ends_there() -> None:
    with gpu():
        for perturb in (None, AddNoise(), MaskWeights()):
            layer = _with(phase=DensePretraining(1, perturb=perturb)).to("cuda")
            layer.on_step_end(1)
            assert layer(torch.randn(5, D, device="cuda")).hidden.is_cuda
            assert layer.phase is not None
            assert not layer.phase.active


@EVERY
def test_soft_layers(device: str) -> None:
    with seeded(0):
        layer, x = SoftMoELayer(experts.GroupedMLP(E, D, 16), 2), torch.randn(2, 6, D)
    wanted = layer(x).hidden
    with gpu(device) as found:
        there, data = copy.deepcopy(layer).to("cuda"), x.to("cuda")
        with found.watch() as waits:
            got = there(data).hidden
            got.sum().backward()
        assert not waits
        got = got.detach().cpu()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["GroupedMLP", "GroupedGLU, additive bias", "BASELayerStack"])
def test_counts_are_read_once_a_layer(name: str, precision: str, capability: tuple[int, int]) -> None:
    """However many products and adapters there are; not at all where the product is one kernel and nothing is left."""
    layer = mk.MoELayer(routers.TopKRouter(D, E, 2), EXPERTS[name]()).train()
    add_adapters(layer, rank=4) if layer.experts.matrices else None
    dtype, amp = PRECISIONS[precision]
    one_kernel = torch.bfloat16 in (dtype, amp) and capability[0] in (9, 10)
    assert compare(layer, "pretended", precision, masked=True, capability=capability) == (1, 0)
    assert compare(layer, "pretended", precision, masked=False, capability=capability) == (0 if one_kernel else 1, 0)


IN_THE_GUIDE: dict[str, Callable[[], mk.MoELayer]] = {
    "zero computation": lambda: mk.MoELayer(
        routers.TopKRouter(D, 6, 2), experts.ZeroComputationExperts(experts.GroupedMLP(2, D, 6))
    ),
    "hierarchical": lambda: mk.MoELayer(routers.HierarchicalRouter(D, 3, 4), experts.GroupedMLP(12, D, 16)),
    "sequence capacity": lambda: mk.MoELayer(
        routers.TopKRouter(D, E, 2, capacity=routers.SequenceCapacity(3)), experts.GroupedMLP(E, D, 16)
    ),
    "base": lambda: mk.MoELayer(routers.BASELayerRouter(D, E, init_gain=1.0), experts.GroupedMLP(E, D, 16)),
}


@pytest.mark.parametrize("name", IN_THE_GUIDE)
def test_waits_that_the_guide_counts(name: str) -> None:
    """One of the layer's forward with padding in bf16, whatever router and bank do beside (docs/guides/cluster.md)."""
    with seeded(0):
        layer = IN_THE_GUIDE[name]().train()
    assert compare(layer, "pretended", "bf16", masked=True, own=9) == (1, 0)


@pytest.mark.parametrize("kind", [PackedDispatcher, PaddedDispatcher])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_dispatchers(kind: type, k: int) -> None:
    """Rows and sums are the CPU's to the last bit, gradients too."""
    routing, x = random_routing(T, E, k, capacity=9), skewed_tokens(T, D).requires_grad_()
    for choices in (None, k):
        routing = dataclasses.replace(routing, choices=choices)

        def run(x: Tensor, routing: Any) -> tuple[Tensor, Tensor]:
            sent = kind().dispatch(x, routing)
            out = kind().combine(torch.sin(sent.rows), routing, sent.handle)
            (gradient,) = torch.autograd.grad(out.square().sum(), x)
            return out, gradient

        wanted = run(x, routing)
        with gpu():
            got = [t.cpu() for t in run(x.detach().to("cuda").requires_grad_(), moved(routing))]
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("kind", [PackedDispatcher, PaddedDispatcher])
def test_three_summands_and_more_are_added_in_a_fixed_order(
    kind: type, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's scattered addition takes any order: of three summands the last bits would change from run to run."""
    called: list[int] = []
    original = torch.Tensor.index_add

    def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        if source.is_floating_point() and index.is_cuda:
            called.append(int(torch.bincount(index).max()))
        return original(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_add", index_add)
    with gpu():
        for choices in (k, None):
            routing = dataclasses.replace(random_routing(T, 6, k, capacity=T), choices=choices)
            x = skewed_tokens(T, D).to("cuda").requires_grad_()
            sent = kind().dispatch(x, moved(routing))
            seen = []
            out = kind().combine(sent.rows, moved(routing), sent.handle)
            node = sent.rows.grad_fn
            while node is not None:
                seen.append(type(node).__name__)
                node = node.next_functions[0][0] if node.next_functions else None
            assert out.shape == (T, D)
            assert ("IndexSelectBackward0" in seen) == (choices == 2), seen  # whose gradient is a scattered addition
    assert all(summands <= 2 for summands in called)


def test_expert_choice_lists_are_in_no_order() -> None:
    routing = routers.ExpertChoiceRouter(D, E)(skewed_tokens(T, D))
    assert routing.choices is None
    assert routing.all_kept


# -- experts on other ranks --------------------------------------------------------------------------------------------


@pytest.fixture
def rank_of_one(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group of one rank, to which everything comes back: what is asked is what the host reads."""
    monkeypatch.setattr("moekit.dispatch.exchange._counts_to", lambda counts, group: counts.clone())
    monkeypatch.setattr("moekit.dispatch.exchange.all_to_all", lambda rows, received, sent, group: rows.clone())
    return SimpleNamespace(size=lambda: 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("levels", [1, 2])
def test_counts_of_divided_experts_are_read_with_the_sizes_of_messages(
    levels: int, precision: str, rank_of_one: Any
) -> None:
    """Once for a layer: a product that needs the counts on the host finds them there."""
    exchange: Any = (
        AllToAll(rank_of_one, overlap=False)
        if levels == 1
        else TwoLevelAllToAll(rank_of_one, rank_of_one, overlap=False)
    )
    dtype, amp = PRECISIONS[precision]
    with seeded(0):
        layer = _with().to(dtype).train()
        layer.experts.w_out.data.normal_()
    x, context = skewed_tokens(T, D, dtype=dtype), some_context(layer.router, T, mask=some_mask(T))
    _, wanted, _, _ = results(copy.deepcopy(layer), x, context, amp, "cpu", nobody)
    layer.connect(exchange)
    with gpu() as found:
        there = copy.deepcopy(layer).to("cuda")
        _, got, forward, backward = results(there, x.to("cuda"), moved(context), amp, "cuda", found.watch)
        got = {name: value.cpu() for name, value in got.items()}
    assert_same(_near(got), _near(wanted), f"over {levels} levels in {precision}")
    explained(forward)
    assert sum(forward.values()) == 1, list(map(str, forward))
    assert not backward


def test_what_losses_sum_is_summed_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scattered addition of three and more numbers that are no counts: their gradients depend on the sums."""
    added: list[str] = []
    original = torch.Tensor.index_add

    def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
        whole = source.detach().float()
        if source.is_cuda and not bool((whole == whole.round()).all()):
            most = int(torch.bincount(index).max())
            added.append(f"{most} summands of {tuple(source.shape)}") if most > 2 else None
        return original(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_add", index_add)
    made: dict[str, Callable[[], Router]] = {
        "noisy": lambda: routers.NoisyTopKRouter(D, E, 2),
        "hierarchical": lambda: routers.HierarchicalRouter(D, 2, 3),
        "by sequence": lambda: routers.TopKRouter(D, E, 2, balance=routers.Balance(scope="sequence")),
    }
    with gpu():
        for make in made.values():
            router = make().to("cuda").train()
            x = torch.randn(T, D, device="cuda").requires_grad_()
            out = router(x, moved(some_context(router, T, mask=None)))
            sum(out.losses.values()).backward()
    assert not added
