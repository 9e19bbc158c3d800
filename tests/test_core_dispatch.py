"""What the contract does not say of the two local dispatchers: that they agree, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moekit.dispatch import PackedDispatcher, PaddedDispatcher
from moekit.experts import GroupedMLP
from moekit.testing import assert_close, assert_same, random_routing, trace

T, E, D = 25, 4, 6


@pytest.mark.parametrize("capacity", [T, 5])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_packed_equals_padded(k: int, capacity: int) -> None:
    """Same outputs and gradients, dropping or not."""
    routing = random_routing(T, E, k, capacity=capacity)
    assert bool(routing.kept.all()) == (capacity == T)
    experts = GroupedMLP(E, D, 8, bias=True, activation="gelu", init_scale=1.0)
    with torch.no_grad():
        experts.b_in.normal_()
        experts.b_out.normal_()
    x = torch.randn(T, D)

    def run(dispatcher: PackedDispatcher | PaddedDispatcher) -> dict[str, torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            sent = dispatcher.dispatch(x, routing)
            return dispatcher.combine(experts(sent.rows, sent.counts), routing, sent.handle)

        return trace(call, experts, x)

    assert_same(run(PaddedDispatcher()), run(PackedDispatcher()), "padded and packed")


def test_packed_rows_are_in_the_order_of_the_queue() -> None:
    """Sorted by expert, and inside an expert by position: the layout that a capacity would give."""
    routing = random_routing(T, E, 2, capacity=7)
    x = torch.arange(T, dtype=torch.float32)[:, None]
    rows = PackedDispatcher().dispatch(x, routing).rows.flatten().tolist()
    expected = [
        float(routing.token[n])
        for e in range(E)
        for n in sorted(
            (n for n in range(2 * T) if routing.kept[n] and routing.expert[n] == e),
            key=lambda n: int(routing.position[n]),
        )
    ]
    assert rows == expected


def test_padded_needs_a_capacity() -> None:
    routing = random_routing(T, E)
    with pytest.raises(ValueError, match="PaddedDispatcher needs a routing with a capacity: got a dropless one"):
        PaddedDispatcher().dispatch(torch.randn(T, D), routing)


def test_packed_traces_on_the_meta_device() -> None:
    """Shapes are known without data: as if everything were kept."""
    routing = random_routing(T, E, 2)
    names = ("token", "expert", "weight", "position", "kept")
    routing = dataclasses.replace(routing, **{n: getattr(routing, n).to("meta") for n in names})
    sent = PackedDispatcher().dispatch(torch.empty(T, D, device="meta"), routing)
    assert sent.rows.shape == (2 * T, D)
    assert PackedDispatcher().combine(sent.rows, routing, sent.handle).shape == (T, D)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_few_rows_without_gradients_are_those_of_the_rest(tokens: int, k: int, dtype: torch.dtype) -> None:
    """A step of decoding sorts its rows one by one."""
    routing = random_routing(tokens, 5, k)
    routing = dataclasses.replace(routing, choices=k, all_kept=True)
    x = torch.randn(tokens, D).to(dtype)
    packed, found = PackedDispatcher(), []
    for without in (False, True):
        with torch.set_grad_enabled(not without):
            sent = packed.dispatch(x, routing)
            assert type(sent.handle).__name__ == ("_Few" if without else "_Handle")
            factor = torch.arange(1.0, 6).repeat_interleave(sent.counts)[:, None].to(dtype)
            found.append((sent.counts, packed.combine(sent.rows * factor, routing, sent.handle)))
    (counts, output), (few_counts, few_output) = found
    assert torch.equal(few_counts, counts)
    assert few_output.dtype == output.dtype
    assert_close(few_output, output)
