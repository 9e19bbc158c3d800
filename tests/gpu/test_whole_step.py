"""A whole training step as one CUDA graph: it reads nothing, and its shapes do not depend on data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import NEEDS_GPU, autocast, examples, gpu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moekit as mk
from moekit import experts, routers
from moekit.data.batch import Batch
from moekit.dispatch import PackedDispatcher
from moekit.routing import Capacity
from moekit.testing import seeded

make_batch, make_head = examples("tasks/test_heads.py", "make_batch", "make_head")
D, E, T = 8, 4, 12


class Shapes(TorchDispatchMode):
    """Every operator and the shapes of what it gives, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.seen.append((str(func), shapes))
        return out


def batches() -> tuple[Batch, Batch]:
    """Two of the same widths and numbers of tokens: every row has another text, and other padding."""
    batch = make_batch("causal_lm")
    assert batch.target is not None
    assert batch.target_mask is not None
    turn = torch.arange(batch.target.shape[0]).flip(0)
    fields = {"source", "source_mask", "source_language", "target", "target_mask", "target_language"}
    held = {name: getattr(batch, name) for name in fields}
    turned = {name: value[turn] for name, value in held.items() if isinstance(value, Tensor)}
    return batch, dataclasses.replace(batch, **turned)


def steps(amp: torch.dtype | None, where: str) -> Callable[[Batch], Tensor]:
    """Head, losses of the routers, backward, and a fused optimizer's step."""
    with seeded(0):
        head, model = make_head("causal_lm")
    head, model = head.to(where).train(), model.to(where).train()
    trained = [*model.parameters(), *(p for p in head.parameters() if all(p is not q for q in model.parameters()))]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)

    def step(batch: Batch) -> Tensor:
        with autocast(amp, where):
            loss: Tensor = head(batch, model).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return step


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
def test_a_step_reads_nothing_and_has_fixed_shapes(amp: torch.dtype | None) -> None:
    """Padded layers, a head over known places, a fused AdamW."""
    one, other = batches()
    with gpu() as found:
        step = steps(amp, "cuda")
        one, other = one.to("cuda"), other.to("cuda")
        step(one)  # makes the optimizer's state
        seen, losses = [], []
        for batch in (one, other):
            with found.watch() as waits, Shapes() as shapes:
                losses.append(step(batch))
            assert not waits, list(map(str, waits))
            seen.append(shapes.seen)
        assert seen[0] == seen[1]
        assert len(seen[0]) > 100
        assert losses[0].item() != losses[1].item()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bf16 autocast"])
def test_a_step_is_captured(amp: torch.dtype | None) -> None:
    """Replayed with other batches it trains as the steps do one by one."""
    pair = [batch.to("cuda") for batch in batches()]
    static = copy.deepcopy(pair[0])
    eager, captured = steps(amp, "cuda"), steps(amp, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured(static)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager(pair[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(static)
    for n in (1, 0, 1):
        for field in dataclasses.fields(static):
            held = getattr(static, field.name)
            if isinstance(held, Tensor):
                held.copy_(getattr(pair[n], field.name))
        graph.replay()
        torch.testing.assert_close(loss, eager(pair[n]), rtol=2e-2, atol=1e-4)


LAYERS: dict[str, Callable[[], mk.MoELayer]] = {
    "packed": lambda: mk.MoELayer(routers.TopKRouter(D, E, 2), experts.GroupedMLP(E, D, 16), PackedDispatcher()),
    "padded": lambda: mk.MoELayer(
        routers.TopKRouter(D, E, 2, capacity=Capacity(1.0, 1.0)), experts.GroupedGLU(E, D, 16)
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_compiles_without_a_break(name: str, training: bool) -> None:
    """Packed where nothing is dropped and nothing is padding; padded with capacity."""
    with seeded(0):
        layer: nn.Module = LAYERS[name]().train(training)
    x = torch.randn(T, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for run in (layer, compiled):
        rows = x.clone().requires_grad_()
        layer.zero_grad()
        out = run(rows)
        (out.hidden.square().sum() + sum(out.routing.losses.values())).backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        found.append([out.hidden.detach(), rows.grad, *gradients])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
