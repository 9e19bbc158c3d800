"""Training steps of a small language model on processes of one machine: `expert_parallel.py --trainer` prints them.

Under `ExpertParallelStrategy` with ZeRO 0 to 3 the model is sparse in every other block; beside it is its dense twin,
of the same active work, under Lightning's DDP and FSDP2, and both in one process with as many threads. All see the same
tokens and take turns, one short training each, round after round. Where the losses of one model differ between its
arms, nothing is reported.

A step is everything from the end of one to the end of the next. Of its wall time, "waiting" is where a process's main
thread did not run, "copying" what its operations took that move numbers and compute none, "compute" the rest.
"messages" is the processor time of the other threads, which send, receive and add up: it runs beside all that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from interleaved import refuse
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from moekit import ExpertParallelStrategy, MoELayer
from moekit.experts import GroupedMLP
from moekit.performance import keep_memory
from moekit.routers import switch
from moekit.testing import JoinedProcesses, run_distributed
from moekit.training.quiet import quiet
from moekit.transformer import MLP, DecoderOnly

LENGTH = 64
WARM_UP = 2
"""Steps that are not counted: they make buffers and the optimizer's state."""
COPIES = frozenset(
    f"aten::{name}"
    for name in (
        "copy_", "_foreach_copy_", "cat", "stack", "_chunk_cat", "split_with_sizes_copy", "fill_", "zero_",
        "index_select", "index", "index_put_", "_index_put_impl_", "index_add_", "gather", "scatter", "scatter_",
    )
) | {"fsdp::split_with_sizes_copy", "fsdp::chunk_cat", "fsdp::all_gather_copy_in"}  # fmt: skip
BASE = "dense twin, DDP"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and its steps; tokens are those of all processes together."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    layers: int = 4
    steps: int = 6


class Network(nn.Module):
    """Logits of the tokens that follow; a module whose forward is everything, as FSDP2 wants it."""

    def __init__(self, model: DecoderOnly) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Float[B, T, V] of Int64[B, T]."""
        return self.model.logits(self.model.decode(ids).hidden)


class Model(L.LightningModule):
    """A language model, sparse in every other block or dense; keeps clocks and losses of its steps.

    Dropless and without noise, so that every layout must have the same losses.
    """

    def __init__(self, shape: Shape, *, sparse: bool, shard: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.shard = shape, shard

        def feed_forward(layer: int, side: Any) -> nn.Module:
            if not sparse or layer % 2 == 0:
                return MLP(shape.dim, shape.hidden)
            router = switch(shape.dim, shape.experts, capacity_factor=None, jitter=0.0)
            return MoELayer(router, GroupedMLP(shape.experts, shape.dim, shape.hidden))

        self.network = Network(DecoderOnly(512, shape.dim, 4, shape.layers, shape.hidden, feed_forward=feed_forward))
        self.clocks: list[tuple[float, float, float]] = []
        self.losses: list[float] = []
        self.trace = profile(activities=[ProfilerActivity.CPU])

    def configure_model(self) -> None:
        """Divide the dense twin as FSDP2 does."""
        if self.shard:
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for block in self.network.model.decoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.network, mesh=mesh)
            self.shard = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Predict the next token."""
        loss = F.cross_entropy(self.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read the clocks; the last step, which is traced, has none."""
        if batch_idx < WARM_UP + self.shape.steps:
            self.clocks.append((time.perf_counter(), time.thread_time(), time.process_time()))
        if batch_idx == WARM_UP + self.shape.steps - 1:
            self.trace.start()

    def on_train_end(self) -> None:
        """End the trace."""
        self.trace.stop()

    def measured(self) -> dict[str, Any]:
        """Medians of the counted steps, in seconds, and all losses."""
        pairs = list(zip(self.clocks[WARM_UP - 1 :], self.clocks[WARM_UP:], strict=False))
        steps = [[b - a for a, b in zip(before, after, strict=True)] for before, after in pairs]
        wall, main, process = (statistics.median(clock) for clock in zip(*steps, strict=True))
        copying = sum(e.self_cpu_time_total for e in self.trace.key_averages() if e.key in COPIES) / 1e6
        return {
            "wall": wall,
            "waiting": wall - main,
            "copying": copying,
            "compute": main - copying,
            "messages": process - main,
            "losses": self.losses,
        }


class Tokens(Dataset[Tensor]):
    """Random tokens; of every batch of all processes the part of one."""

    def __init__(self, shape: Shape, rank: int, ranks: int) -> None:
        steps, each = WARM_UP + shape.steps + 1, shape.tokens // LENGTH // ranks
        ids = torch.randint(1, 512, (steps, ranks, each, LENGTH + 1), generator=torch.Generator().manual_seed(2))
        self.ids, self.each = ids[:, rank].flatten(0, 1), each

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def train(model: Model, rank: int, ranks: int, **options: Any) -> dict[str, Any]:
    """What a short training took."""
    data = Tokens(model.shape, rank, ranks)
    with quiet():
        trainer = L.Trainer(
            max_steps=WARM_UP + model.shape.steps + 1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, batch_size=data.each))
    return model.measured()


def arms(shape: Shape, ranks: int) -> Iterator[tuple[str, Model, Any]]:
    """Name, model and strategy of everything that runs on several processes."""
    yield BASE, Model(shape, sparse=False), "ddp"
    fsdp = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    yield "dense twin, FSDP2", Model(shape, sparse=False, shard=True), fsdp
    for stage in (0, 1, 2, 3):
        strategy = ExpertParallelStrategy(ranks, zero_stage=stage)  # type: ignore[arg-type]
        yield f"sparse, experts divided, ZeRO {stage}", Model(shape, sparse=True), strategy


def together(shape: Shape) -> dict[str, dict[str, Any]]:
    """One training of each arm; a rank of the group."""
    keep_memory()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, model, strategy in arms(shape, ranks):
        dist.barrier()
        found[name] = train(model, rank, ranks, devices=ranks, plugins=[JoinedProcesses()], strategy=strategy)
    return found


def alone(shape: Shape, threads: int) -> dict[str, dict[str, Any]]:
    """The same of one process with as many threads."""
    keep_memory()
    torch.set_num_threads(threads)
    return {
        f"{name}, one process": train(Model(shape, sparse=sparse), 0, 1, devices=1)
        for name, sparse in (("dense twin", False), ("sparse", True))
    }


def round_of(shape: Shape, ranks: int) -> dict[str, dict[str, Any]]:
    """Every arm once: the slowest process's wall time, means of what it is made of, and the mean loss of the last step.

    Exits if two arms of one model have different losses.
    """
    every = run_distributed(together, ranks, shape, timeout=600)
    one = run_distributed(alone, 1, shape, ranks, timeout=600)
    found: dict[str, dict[str, Any]] = {}
    for name in (*every[0], *one[0]):
        parts = [part[name] for part in (every if name in every[0] else one)]
        found[name] = {key: statistics.mean(part[key] for part in parts) for key in parts[0] if key != "losses"}
        found[name]["wall"] = max(part["wall"] for part in parts)
        found[name]["loss"] = statistics.mean(part["losses"][-1] for part in parts)
    for model in ("dense", "sparse"):
        losses = {name: row["loss"] for name, row in found.items() if name.startswith(model)}
        if max(losses.values()) - min(losses.values()) > 1e-3:
            refuse(f"losses of the {model} model differ: {losses}")
    return found


def merged(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over rounds, and of the ratios to `BASE` in the same round."""
    rows = []
    for name in rounds[0]:
        row: dict[str, Any] = {"arm": name, "rounds": [found[name]["wall"] for found in rounds]}
        row |= {key: statistics.median(found[name][key] for found in rounds) for key in rounds[0][name]}
        row["ratio"] = statistics.median(found[name]["wall"] / found[BASE]["wall"] for found in rounds)
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text; of one process, whose other threads compute, only the wall time is told apart."""
    lines = [f"{'a training step':<34}   ms  over DDP  compute  copying  waiting  messages beside it"]
    for row in rows:
        line = f"{row['arm']:<34} {row['wall'] * 1e3:5.0f}  {row['ratio']:8.2f}"
        if "one process" not in row["arm"]:
            line += "".join(
                f"  {row[part] / row['wall']:7.0%}" for part in ("compute", "copying", "waiting", "messages")
            )
        lines.append(line)
    return "\n".join(lines)
