"""What modules and routings say of themselves on a prompt and in a notebook."""

from __future__ import annotations

import dataclasses
import re

import torch

import moekit as mk
from moekit.testing.pretended_gpu import pretended_gpu

D, E = 8, 4


def test_modules_say_their_sizes() -> None:
    router = mk.routers.switch(D, E, capacity_factor=1.5)
    layer = mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 16, activation="gelu"), mk.PackedDispatcher())
    shown = repr(layer)
    assert shown.startswith("MoELayer(\n  num_experts=4, dispatcher=PackedDispatcher\n")
    assert "GroupedMLP(num_experts=4, dim=8, hidden_dim=16, activation='gelu', dropout=0.0)" in shown
    assert "k=1" in shown
    assert "capacity=Capacity(train=1.5, eval=None, share='tokens')" in shown
    assert eval(repr(router.capacity), {"Capacity": mk.Capacity}) == router.capacity
    bank = mk.experts.ZeroComputationExperts(mk.experts.GroupedGLU(2, D, 5), constant=0)
    assert "num_experts=4, dim=8, zero=1, copy=1, constant=0" in repr(bank)
    assert "dim=8, num_experts=4, slots=2" in repr(mk.SoftMoELayer(mk.experts.GroupedMLP(E, D, 16), 2))


def skewed() -> mk.Routing:
    """Eight tokens, six of which want expert 0; it has room for four."""
    expert = torch.tensor([0, 0, 0, 0, 0, 0, 1, 3])
    capacity = mk.Capacity(train=2.0, minimum=1)
    return mk.routers.routing_of_choices(expert, torch.ones(8), E, capacity=capacity, training=True)


def test_a_routing_says_what_was_dropped() -> None:
    assert repr(skewed()) == "Routing(tokens=8, experts=4, assignments=8, k=1, capacity=4, dropped=25.0%)"
    _, routing = mk.MoELayer(mk.routers.gshard(D, E), mk.experts.GroupedMLP(E, D, 5)).eval()(torch.randn(3, 5, D))
    assert repr(routing) == "Routing(tokens=15, experts=4, assignments=30, k=2, capacity=None, dropped=0.0%)"
    empty = mk.routers.routing_of_choices(torch.zeros(0, dtype=torch.int64), torch.ones(0), E)
    assert "tokens=0" in repr(empty)
    assert "<table>" in empty._repr_html_()


def test_notebooks_show_load_and_escape_names() -> None:
    routing = dataclasses.replace(skewed(), losses={"<b>x</b>": torch.tensor(0.25)})
    page = routing._repr_html_()
    assert "<b>x" not in page
    assert "<th>&lt;b&gt;x&lt;/b&gt;</th><td>0.25</td>" in page
    heights = [int(height) for height in re.findall(r"height:(\d+)px", page)]
    assert heights == [40, 7, 1, 7]
    assert 'title="expert 0: 6 (75.0%)"' in page


def test_nothing_waits_for_a_gpu_to_be_printed() -> None:
    with pretended_gpu() as gpu:
        routing = torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to("cuda"), skewed())
        with gpu.watch() as waits:
            assert repr(routing) == "Routing(tokens=8, experts=4, assignments=8, k=1, capacity=4)"
        assert not waits
        assert "dropped</th><td>25.0%" in routing._repr_html_()
