"""Bytes that ranks hold, measured, beside what the planner says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moekit.parallel import Layout, MasterWeights, build_meshes, parallelize
from moekit.planner import Training, TransformerShape, plan
from moekit.testing import run_distributed
from moekit.transformer.init import materialize

SHAPE = TransformerShape(
    vocab_size=64,
    dim=32,
    heads=4,
    hidden_dim=64,
    encoder_layers=2,
    decoder_layers=2,
    num_experts=8,
    capacity_factor=None,
)
GRID: dict[int, list[dict[str, Any]]] = {
    2: [
        {"zero_stage": stage, "expert_parallel_size": expert, "offload": offload}
        for stage in (0, 1, 2, 3)
        for expert in (1, 2)
        for offload in ("none", "optimizer", "parameters")
        if offload == "none" or (stage, expert) in ((1, 2), (3, 2))
        if not (offload == "parameters" and stage < 2)
    ],
    4: [
        *({"zero_stage": stage, "expert_parallel_size": expert} for stage in (0, 1, 2, 3) for expert in (1, 2, 4)),
        {"zero_stage": 3, "expert_parallel_size": 2, "tensor_parallel_size": 2},
        {"zero_stage": 1, "expert_parallel_size": 2, "tensor_parallel_size": 2},
        {"zero_stage": 2, "expert_parallel_size": 2, "replicas": 2},
    ],
}


def held(tensors: Any) -> int:
    """Bytes of storage on this rank; every storage once."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes() if storage.nbytes() else 0
    return sum(storages.values())


def measure(world: int) -> list[dict[str, int]]:
    rows = []
    for options in GRID[world]:
        layout = Layout(devices=world, **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = SHAPE.module()
            materialize(model, "cpu")
        parallelize(model, build_meshes(layout, "cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        offloaded = layout.offload == "optimizer"
        master = None
        if layout.zero_stage == 1 or offloaded:
            device = torch.device("cpu") if offloaded else None
            master = MasterWeights(optimizer, divide=layout.zero_stage == 1, device=device)
        step = Step(model)
        step(torch.arange(48).remainder(64).view(4, 12))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        rows.append({"gradients": sum(local(g).nbytes for g in gradients), "count": len(gradients)})
        optimizer.step()
        rows[-1]["weights"] = sum(local(p).nbytes for p in model.parameters())
        state = [value for values in optimizer.state.values() for value in values.values()]
        rows[-1]["optimizer"] = sum(local(t).nbytes for t in state if isinstance(t, Tensor))
        copies = master.entries.values() if master is not None and offloaded else []
        rows[-1]["copies"] = sum(local(entry.tensor).nbytes for entry in copies)
        # What is divided is no view of something whole that is kept.
        rows[-1]["storage"] = held(model.parameters())
    return rows


class Step:
    """Forward and backward through the root, for which weights are gathered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.forward = self.loss

    def loss(self, ids: Tensor) -> Tensor:
        memory = self.model.encode(ids).hidden
        logits = self.model.logits(self.model.decode(ids, memory).hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    def __call__(self, ids: Tensor) -> None:
        self.model(ids).backward()


def local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


@pytest.mark.slow
def test_measured_bytes_are_the_planned() -> None:
    """Every ZeRO stage and expert-parallel size, every rank: within 1 % (they differ by AdamW's step counters)."""
    number = 0
    for world, layouts in GRID.items():
        ranks = run_distributed(measure, world, world)
        for options, *measured in zip(layouts, *ranks, strict=True):
            memory = plan(SHAPE, Layout(devices=world, **options), Training(precision="32-true")).memory
            offload = options.get("offload", "none")
            expected = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
            if offload == "optimizer":
                copies = 2 * measured[0]["copies"]  # of weights, and in the step of gradients
                expected["optimizer"] = memory.host - copies
            if offload == "parameters":
                base = {name: value for name, value in options.items() if name != "offload"}
                kept = plan(SHAPE, Layout(devices=world, **base), Training(precision="32-true")).memory
                assert memory.host == kept.weights + kept.gradients + kept.optimizer
                expected = {"weights": kept.weights, "gradients": kept.gradients, "optimizer": kept.optimizer}
            for rank, row in enumerate(measured):
                number += 1
                for name, value in expected.items():
                    message = f"{options} on rank {rank}: {name} {row[name]} measured, {value:.0f} planned"
                    assert abs(row[name] - value) <= 0.01 * value, message
                assert row["storage"] == row["weights"], f"{options} on rank {rank} keeps {row['storage']} bytes"
    print(f"{number} ranks measured")
