"""What cannot be is refused: by the constructor, by the layout, or by the model, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

import moekit as mk
from moekit import ExpertParallelStrategy
from moekit.experts import GroupedMLP
from moekit.parallel import Layout, ShardingPlan, layers_of, no_layers, repeated_layers
from moekit.parallel.annotation import check_model, read_annotations
from moekit.parallel.layout import zero_dimension
from moekit.routers import switch
from moekit.transformer import Block, DecoderOnly, SelfAttention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3: got 4"),
        ({"offload": "nvme"}, 'offload must be "none", "optimizer" or "parameters": got \'nvme\''),
        ({"replicas": 2, "zero_stage": 1}, "replicas are for zero_stage 2 and 3.*Use replicas=1, or zero_stage=2"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"expert_parallel_size": 0}, "expert_parallel_size must be at least 1"),
        ({"nonfinite_gradients": "ignore"}, 'nonfinite_gradients must be "raise" or "skip"'),
    ],
)
def test_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertParallelStrategy(**options)


def test_constructor_types() -> None:
    with pytest.raises(TypeError, match="expert_parallel_size must be a number or \"auto\": got 'two'"):
        ExpertParallelStrategy("two")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"devices": 4, "expert_parallel_size": 3}, "got 3 \\* 1 \\* 1 for 4. Use expert_parallel_size=2"),
        ({"devices": 4, "expert_parallel_size": 4, "tensor_parallel_size": 2}, "Use expert_parallel_size=2"),
        (
            {"devices": 8, "expert_parallel_size": 4, "replicas": 4},
            "got 4 \\* 1 \\* 4 for 8. Use expert_parallel_size=2",
        ),
        ({"devices": 12, "expert_parallel_size": 4, "tensor_parallel_size": 2}, "Use expert_parallel_size=3"),
    ],
)
def test_layouts_that_do_not_fit(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**layout)


def lm(experts: int = 4, **bank: Any) -> nn.Module:
    def sparse(layer: int, side: Any) -> nn.Module:
        return mk.MoELayer(switch(8, experts), GroupedMLP(experts, 8, 6, **bank))

    return DecoderOnly(12, 8, 2, 2, 6, feed_forward=sparse)


class NoAxes(GroupedMLP):
    """A parameter that nobody named."""

    def __init__(self) -> None:
        super().__init__(4, 8, 6)
        self.extra = nn.Parameter(torch.zeros(3))


class WrongAxes(GroupedMLP):
    """A name too few."""

    axes = {**GroupedMLP.axes, "w_in": ("expert", "embed")}  # noqa: RUF012


class Table(nn.Embedding):
    """A vocabulary axis without a `vocabulary`."""

    axes = {"weight": ("vocab", "embed")}  # noqa: RUF012


class Whole(GroupedMLP):
    requires_whole_bank = True


@pytest.mark.parametrize(
    ("build", "layout", "message"),
    [
        (lambda: lm(6), {"expert_parallel_size": 4}, "the axis 'expert' of .*w_in must be divisible by expert_parallel_"
         "size: got 6 and 4. Use expert_parallel_size=3, or make it 8"),
        (lambda: SelfAttention(8, 2), {"tensor_parallel_size": 4}, "the axis 'heads' of qkv.weight .* got 2 and 4. Use "
         "tensor_parallel_size=2, or make it 4"),
        (lambda: nn.Linear(2, 2), {"tensor_parallel_size": 2}, "needs modules that name an axis mlp, heads or vocab"),
        (lambda: Table(4, 2), {"tensor_parallel_size": 2}, "TokenEmbedding, or a ShardingPlan without"),
        (lambda: GroupedMLP(4, 8, 6), {"expert_parallel_size": 2}, "are not in a MoELayer"),
        (lambda: mk.MoELayer(switch(8, 4), NoAxes()), {}, "every parameter of an expert bank must be named .* extra"),
        (lambda: mk.MoELayer(switch(8, 4), WrongAxes(4, 8, 6)), {}, "must name every dimension"),
        (lambda: mk.MoELayer(switch(8, 4), Whole(4, 8, 6)), {"expert_parallel_size": 2}, "all its experts in one proc"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit(build: Callable[[], nn.Module], layout: dict[str, Any], message: str) -> None:
    model, plan = build(), ShardingPlan()
    with pytest.raises(ValueError, match=message):
        check_model(model, Layout(devices=4, **layout), plan, read_annotations(model, plan))


def test_plans() -> None:
    with pytest.raises(ValueError, match='maps "expert" to the mesh dimension "expert" and other axes to "tensor"'):
        ShardingPlan(axes={"expert": "tensor"})
    with pytest.raises(ValueError, match="node_size must be at least 1"):
        ShardingPlan(node_size=0)
    whole = ShardingPlan(axes={"expert": "expert"})
    model = Table(4, 2)
    found = read_annotations(model, whole)
    assert [note.divided for note in found] == [{}]
    model = lm()
    assert len(repeated_layers(model)) == 2
    assert all(isinstance(layer, Block) for layer in repeated_layers(model))
    assert no_layers(model) == []
    assert len(list(layers_of(SelfAttention)(model))) == 2


def test_axes_of_a_model() -> None:
    found = {note.path: note for note in read_annotations(lm(bias=True), ShardingPlan())}
    assert found["decoder.layers.0.feed_forward.experts.w_in"].divided == {0: "expert", 2: "tensor"}
    assert found["decoder.layers.0.feed_forward.experts.b_out"].is_output_bias
    assert not found["decoder.layers.0.feed_forward.experts.b_in"].is_output_bias
    assert found["decoder.layers.1.self_attention.qkv.weight"].divided == {1: "tensor"}
    assert found["embedding.weight"].divided == {0: "tensor"}
    assert not any(note.divided for path, note in found.items() if "router" in path or "norm" in path)


@pytest.mark.parametrize(
    ("shape", "taken", "size", "expected"),
    [
        ((8, 3), (), 4, 0),
        ((8, 4), (0,), 4, 1),
        ((8, 4, 16), (0,), 4, 2),
        ((8, 3), (0,), 4, 0),  # taken, but even
        ((7, 3), (), 4, 0),  # uneven, but free
        ((7, 3), (0,), 4, None),
        ((7,), (), 1, 0),
    ],
)
def test_what_zero_divides(shape: tuple[int, ...], taken: tuple[int, ...], size: int, expected: int | None) -> None:
    assert zero_dimension(shape, taken, size) == expected


def test_registered_names() -> None:
    for name, stage, offload in (
        ("expert_parallel", 3, "none"),
        ("expert_parallel_zero0", 0, "none"),
        ("expert_parallel_zero1_offload", 1, "optimizer"),
        ("expert_parallel_zero3_offload", 3, "parameters"),
    ):
        assert name in StrategyRegistry
        strategy = L.Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        assert (strategy.zero_stage, strategy.offload) == (stage, offload)
    ExpertParallelStrategy.register_strategies(StrategyRegistry)  # again is harmless


def test_before_setup() -> None:
    with pytest.raises(RuntimeError, match="has meshes after its setup"):
        _ = ExpertParallelStrategy(1).meshes
