"""What the planner counts of a model, its parameters, operations and kept numbers: as torch counts, as published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tiny_shape import TINY
from torch import nn

from moekit import routers
from moekit.experts import BASELayerStack, GroupedGLU, GroupedMLP
from moekit.layer import MoELayer, moe_layers
from moekit.planner import (
    DEEPSPEED_3_5T,
    ST_MOE_32B,
    ZCODE_M3_10B,
    GatheredUnit,
    Layout,
    Training,
    TransformerShape,
    measure,
    plan,
    take_census,
)
from moekit.planner.costs import experts_cost
from moekit.planner.measure import flop_counter
from moekit.recipes import zcode_m3
from moekit.routers import DenseToSparseRouter, ExpertChoiceRouter, ExponentialDecay, switch
from moekit.routing import Router, RoutingContext
from moekit.runs import RunText
from moekit.soft_moe import SoftMoELayer
from moekit.transformer import MLP, DecoderOnly, EncoderOnly, Side, SinusoidalPositions, SparseDense

SHAPES: dict[str, TransformerShape] = {
    "padded": TINY,
    "packed, two choices": replace(TINY, capacity_factor=None, k=2),
    "gated, dense branch beside": replace(TINY, gated=True, activation="gelu", beside=96, norm="rms", sparse_every=2),
    "gelu, untied, smaller experts": replace(TINY, activation="gelu", tied=False, expert_hidden_dim=32, head_dim=8),
    "every layer sparse": replace(TINY, sparse_every=1, capacity_factor=2.0),
    "dense": replace(TINY, num_experts=0),
    "decoder only": replace(TINY, encoder_layers=0, decoder_layers=6, sparse_every=3),
    "encoder only": replace(TINY, encoder_layers=3, decoder_layers=0, sparse_every=3),
}


class Forward(nn.Module):
    """A model's whole way from ids to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        model, memory = self.model, None
        if hasattr(model, "encode"):
            memory = model.encode(source)
            if not hasattr(model, "decode"):
                return model.logits(memory.hidden), memory
            out = model.decode(target, memory.hidden)
        else:
            out = model.decode(target)
        return model.logits(out.hidden), out, memory


def ids(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (training.source_length, training.target_length)
    source, target = (torch.zeros(training.sequences, n, dtype=torch.int64) for n in sizes)
    return source, target


def kept(made: Any, training: Training) -> float:
    return sum(unit.count * unit.cost.kept_bytes(training.numbers) for unit in made.units)


@pytest.mark.parametrize("name", SHAPES)
def test_formulas_equal_what_torch_counts(name: str) -> None:
    shape = SHAPES[name]
    training = Training(sequences=4, source_length=12, target_length=10, precision="32-true")
    model = shape.module()
    torch_says = measure(Forward(model), *ids(training))
    formulas = take_census(shape, training)

    assert formulas.parameters == torch_says.parameters == sum(p.numel() for p in model.parameters())
    assert formulas.forward_flops == torch_says.flops
    # On the meta device attention runs unfused and keeps its probabilities, in two copies of queries and keys more;
    # beside them a few numbers for each token. Both vanish at real widths: see below.
    assert torch_says.kept == pytest.approx(kept(formulas, training), rel=0.5)


def test_activations_at_real_width() -> None:
    training = Training(sequences=2, source_length=16, target_length=12, precision="32-true")
    for shape in (ZCODE_M3_10B, ST_MOE_32B):
        # RMS norm is one kernel on an accelerator and several here.
        short = replace(shape.shortened(), vocab_size=1000, norm="layer")
        measured = measure(Forward(short.module()), *ids(training)).kept
        # Unfused attention is what is left of the difference.
        assert measured == pytest.approx(kept(take_census(short, training), training), rel=0.01)


def kept_by_a_forward(model: nn.Module, training: Training) -> int:
    """Bytes that autograd keeps of a forward, other than the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            stored.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16-mixed"), hooks:
        out = Forward(model)(*ids(training))
    measured = sum(t.untyped_storage().nbytes() for t in stored.values())
    del out
    return measured


def real(shape: TransformerShape) -> Any:
    model = shape.module().to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activations_of_a_real_forward(precision: str) -> None:
    """On a CPU, where attention is fused; in mixed precision autograd also keeps the weights in bf16."""
    shape = replace(TINY, vocab_size=32, dim=256, hidden_dim=512, capacity_factor=None, k=2, gated=True)
    training = Training(sequences=4, source_length=64, target_length=48, precision=precision)
    model = real(shape)
    if precision == "bf16-true":
        model.bfloat16()
    mixed = precision == "bf16-mixed"
    census = take_census(model, training)
    expected = kept(census, training) + (2 * census.parameters if mixed else 0)
    # What is kept on a GPU and not here: the experts' results of a dropless layer, once they are weighed.
    tokens = {"encoder": 4 * 64, "decoder": 4 * 48}
    weighed = sum(2 * tokens[path.partition(".")[0]] * 256 * 4 for path, _ in moe_layers(model))
    expected -= 0 if mixed else weighed
    assert kept_by_a_forward(model, training) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["gate", "expert choice"])
def test_routers_whose_tokens_take_a_number_of_experts_that_is_no_setting(kind: str) -> None:
    """The gate has all eight at first, which memory must hold, and one in the end, by which work is counted."""
    shape = replace(TINY, vocab_size=32, dim=256, hidden_dim=512, encoder_layers=0, decoder_layers=6, sparse_every=3)
    training = Training(sequences=4, source_length=64, target_length=48, precision="32-true")
    model = real(shape)
    choices, most = (1, 8) if kind == "gate" else (3, 3)
    for _, layer in moe_layers(model):
        layer.router = (
            DenseToSparseRouter(256, 8, ExponentialDecay(2.0, 0.3, 100), hard_from=100, threshold=0.0)
            if kind == "gate"
            else ExpertChoiceRouter(256, 8, capacity_factor=3.0, allow_future=True)
        )
    t, made = 4 * 48, take_census(model, training)
    assert kept_by_a_forward(model, training) == pytest.approx(kept(made, training), rel=0.03)
    bank = 8 * 2 * 256 * 512
    assert made.active_parameters == made.parameters - 2 * bank * (8 - choices) // 8
    assert made.most_active_parameters == made.parameters - 2 * bank * (8 - most) // 8
    sparse = next(unit for unit in made.units if unit.name == "decoder sparse block")
    plain = next(unit for unit in made.units if unit.name == "decoder block")
    dense_feed_forward = 2 * t * 2 * 256 * 512
    assert sparse.cost.flops - plain.cost.flops == 2 * t * 256 * 8 + (choices - 1) * dense_feed_forward
    assert sparse.cost.sent == choices * t * 256
    assert sparse.cost.summed_forward - plain.cost.summed_forward == (choices - 1) * t * 256


@pytest.mark.parametrize("order", ["after", "before"])
def test_an_extra_feed_forward_counts(order: Literal["after", "before"]) -> None:
    """ST-MoE's sparse-dense block: a branch more, with a norm of its own."""
    training = Training(sequences=4, source_length=64, target_length=48, precision="32-true")

    def feed_forward(layer: int, side: Side) -> SparseDense:
        return SparseDense(MoELayer(routers.TopKRouter(64, 8), GroupedMLP(8, 64, 128)), MLP(64, 96), order)

    positions = SinusoidalPositions()
    model = DecoderOnly(32, 64, 4, layers=3, hidden_dim=128, feed_forward=feed_forward, positions=positions)
    formulas = take_census(model, training)
    torch_says = measure(Forward(model), *ids(training))
    assert formulas.parameters == torch_says.parameters
    assert formulas.forward_flops == torch_says.flops
    weighed = 3 * 4 * 48 * 64 * 4  # on a GPU and not here, as above
    assert kept_by_a_forward(model, training) == pytest.approx(kept(formulas, training) - weighed, rel=0.01)


@pytest.mark.parametrize("slots", [1, 4])
def test_soft_experts_count_by_their_slots(slots: int) -> None:
    training = Training(sequences=4, source_length=64, target_length=48, precision="32-true")

    def feed_forward(layer: int, side: Side) -> SoftMoELayer:
        return SoftMoELayer(GroupedMLP(8, 64, 256), slots)

    positions = SinusoidalPositions()
    model = EncoderOnly(32, 64, 4, layers=2, hidden_dim=256, feed_forward=feed_forward, positions=positions)
    formulas = take_census(model, training)
    torch_says = measure(Forward(model), *ids(training))
    assert formulas.active_parameters == formulas.parameters == torch_says.parameters
    assert formulas.forward_flops == torch_says.flops
    assert kept_by_a_forward(model, training) == pytest.approx(kept(formulas, training), rel=0.01)


def counted(module: nn.Module, *given: Any) -> int:
    """Operations of a real forward, as torch counts them."""
    with flop_counter() as counter:
        module(*given)
    return counter.get_total_flops()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_experts_that_are_stacks(num_layers: int) -> None:
    """All blocks of an expert of BASE layers count, in operations and, but for the norms, in what is kept."""
    bank = BASELayerStack(4, 64, 256, num_layers=num_layers)
    rows = torch.randn(40, 64, requires_grad=True)
    cost = experts_cost(bank, 40)
    assert cost.flops == counted(bank, rows, torch.tensor([10, 20, 0, 10])) == num_layers * 2 * 40 * 2 * 64 * 256
    assert cost.compute == num_layers * 40 * (64 + 256)


ROUTERS: dict[str, tuple[Callable[[], Router], int]] = {
    "linear": (lambda: switch(64, 8), 64 * 8),
    "two matrices": (lambda: routers.noisy_topk(64, 8), 2 * 64 * 8),
    "cosine": (lambda: routers.CosineRouter(64, 8, projected_dim=16), 64 * 16 + 16 * 8),
    "groups": (lambda: routers.HierarchicalRouter(64, 4, 8), 2 * 64 * (4 + 2 * 8)),
    "assignment": (lambda: routers.base_layers(64, 8), 64 * 8),
    "table of tokens": (lambda: routers.hash_random(8, 16), 0),
    "scores of tasks": (lambda: routers.TaskRouter(64, 8, num_tasks=3), 0),
    "table of tasks": (lambda: routers.TaskTableRouter(8, [2, 0, 2]), 0),
    "nothing": (lambda: routers.UniformRouter(8), 0),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_products_of_routers(name: str) -> None:
    """A router that looks experts up multiplies nothing."""
    make, expected = ROUTERS[name]
    router = make()
    context = RoutingContext(token_ids=torch.arange(40) % 16, task=torch.arange(40) % 3)
    assert router.multiplications_per_token == expected
    assert counted(router, torch.randn(40, 64), context) == 2 * 40 * expected


def test_a_shape_is_counted_as_the_module_it_describes() -> None:
    training = Training(checkpointing=True)

    def equal(a: tuple[GatheredUnit, ...], b: tuple[GatheredUnit, ...]) -> bool:
        return set(a) == set(b) and len(a) == len(b)

    for shape in (*SHAPES.values(), ZCODE_M3_10B, ST_MOE_32B, DEEPSPEED_3_5T):
        assert equal(take_census(shape, training).units, take_census(shape.module(), training).units), shape.name
    other = take_census(replace(TINY, num_experts=16), training).units
    assert not equal(take_census(TINY, training).units, other)


def test_the_recipe_is_the_shape() -> None:
    """The paper variant of the Z-code M3 recipe on the meta device: torch's own count of its parameters."""
    with torch.device("meta"):
        built = zcode_m3.build(zcode_m3.PAPER, RunText(250_000))
        whole = nn.ModuleList([built.backbone, *built.heads])
    layout, training = Layout(devices=64, expert_parallel_size=64), Training(checkpointing=True)
    backbone = plan(built.backbone, layout, training)
    assert backbone.parameters == sum(p.numel() for p in built.backbone.parameters())
    assert backbone.parameters == plan(ZCODE_M3_10B, layout, training).parameters
    assert backbone.parameters == pytest.approx(10e9, rel=0.05)  # the paper says 10 B

    # With its heads, one of which has a small generator of its own.
    everything = plan(whole, layout, training)
    assert everything.parameters == sum(p.numel() for p in whole.parameters())
    assert everything.parameters > backbone.parameters


def test_published_sizes() -> None:
    layout = Layout(devices=512, expert_parallel_size=64)
    st_moe = plan(ST_MOE_32B, layout)
    assert st_moe.parameters == pytest.approx(269e9, rel=0.015)
    without = plan(replace(ST_MOE_32B, beside=0), layout)
    assert without.parameters == pytest.approx(269e9, rel=0.003)
    # "FLOPs comparable to a 32 B dense model": two of 64 experts and all the rest.
    assert without.active_parameters == pytest.approx(32e9, rel=0.12)
    assert plan(DEEPSPEED_3_5T, layout).parameters == pytest.approx(3.5e12, rel=0.02)


def test_active_parameters_by_hand() -> None:
    made = plan(replace(TINY, k=2), Layout())
    bank = 8 * 2 * 64 * 128
    assert made.census.expert_parameters == 3 * bank
    assert made.active_parameters == made.parameters - 3 * bank * 6 // 8


def test_unknown_models() -> None:
    layer = MoELayer(switch(8, 4), GroupedMLP(4, 8, 16))
    with pytest.raises(ValueError, match=r"moekit's transformers .*: got MoELayer, which contains none"):
        plan(layer, Layout())
    measured = measure(layer, torch.zeros(16, 8))
    assert measured.parameters == 4 * 8 + 4 * 2 * 8 * 16
    # Capacity factor 1.25: 5 slots for each of 4 experts.
    assert measured.flops == 2 * 16 * 8 * 4 + 2 * 20 * 2 * 8 * 16
    assert measure(GroupedGLU(4, 8, 16), torch.zeros(4, 5, 8)).flops == 2 * 20 * 3 * 8 * 16
    assert layer.router.weight.device.type == "cpu"
