"""Expert parallelism on processes of one machine: wall time beside one process, where it goes, and uneven loads.

Layer: one sparse feed-forward, forward and backward, dropless, of which W processes with one thread each hold E / W
experts; beside it one process with W threads and all experts, for the same tokens. Experts are prescribed and not
learned, so that the load is known: balanced, half of the first choices to one expert, everything to one rank, nothing
to one rank, and a hot expert that moves every round. Both take turns; where their outputs differ, nothing is reported.
Of the wall time, "compute" is the experts' work of the busiest process alone, "exchange" the same messages without it;
"rest" is waiting and what routing and gathering take.

Trainer (--trainer): steps of a small language model under `ExpertParallelStrategy` with ZeRO 0 to 3, beside Lightning's
DDP and FSDP2 of its dense twin, and one process.

    python benchmarks/expert_parallel.py                        # the layer, 2 processes
    python benchmarks/expert_parallel.py --processes 4 --trainer
    python benchmarks/expert_parallel.py --quick                # toy sizes: does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from moekit import ExpertParallelStrategy, MoELayer
from moekit.dispatch import AllToAll, PackedDispatcher
from moekit.environment import environment
from moekit.experts import GroupedMLP
from moekit.routers import switch
from moekit.routers.queueing import routing_of_choices
from moekit.routing import Router, Routing, RoutingContext
from moekit.testing import JoinedProcesses, run_distributed
from moekit.training.quiet import quiet
from moekit.transformer import MLP, DecoderOnly

LOADS = ("balanced", "hot expert", "hot rank", "empty rank", "moving hotspot")


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured; tokens are those of all processes together."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 2048
    experts: int = 8
    rounds: int = 8
    steps: int = 12


QUICK = Sizes(tokens=64, dim=8, hidden=16, experts=4, rounds=2, steps=2)


class Prescribed(Router):
    """Sends tokens where it is told, with a learned weight."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim
        self.weight = nn.Parameter(torch.full((dim,), 0.01))
        self.expert = torch.zeros(0, 1, dtype=torch.int64)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """The routing that was prescribed."""
        weight = (x.float() @ self.weight).sigmoid()[:, None].expand(self.expert.shape)
        return routing_of_choices(self.expert, weight, self.num_experts)


def prescribed(load: str, round_: int, sizes: Sizes, k: int, ranks: int) -> Tensor:
    """Int64[T, k]: k different experts of every token."""
    e, here = sizes.experts, sizes.experts // ranks
    token = torch.arange(sizes.tokens)[:, None]
    even = token * k + torch.arange(k)
    match load:
        case "hot rank":
            return even % here
        case "empty rank":
            return even % (e - here)
        case "hot expert" | "moving hotspot":
            hot = round_ % e if load == "moving hotspot" else 0
            others = even % (e - 1) + (even % (e - 1) >= hot)
            others[::2, 0] = hot
            return others
    return even % e


def layer_of(sizes: Sizes, first: int, count: int) -> tuple[MoELayer, Prescribed]:
    """Experts `first` to ``first + count`` of the bank, and the router of all."""
    generator = torch.Generator().manual_seed(0)
    bank = GroupedMLP(count, sizes.dim, sizes.hidden, activation="relu")
    with torch.no_grad():
        for parameter in bank.parameters():
            whole = torch.randn((sizes.experts, *parameter.shape[1:]), generator=generator) * sizes.dim**-0.5
            parameter.copy_(whole[first : first + count])
    router = Prescribed(sizes.dim, count)
    layer = MoELayer(router, bank)
    router.num_experts = sizes.experts
    return layer, router


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def slowest(value: float) -> float:
    """The largest of the ranks' numbers."""
    number = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return float(number)


class Rank:
    """What a process of the group holds: its share of the bank, its tokens, and on the first one the whole bank."""

    def __init__(self, sizes: Sizes) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.here = sizes.experts // self.ranks
        self.own = slice(self.rank * sizes.tokens // self.ranks, (self.rank + 1) * sizes.tokens // self.ranks)
        assert dist.group.WORLD is not None
        self.sizes, self.exchange = sizes, AllToAll(dist.group.WORLD)
        self.whole = layer_of(sizes, 0, sizes.experts)
        self.part = layer_of(sizes, self.rank * self.here, self.here)
        self.part[0].connect(self.exchange)
        self.x = torch.randn(sizes.tokens, sizes.dim, generator=torch.Generator().manual_seed(1))

    def step(self, pair: tuple[MoELayer, Prescribed], x: Tensor, expert: Tensor) -> tuple[float, Tensor]:
        """Seconds of forward and backward, and the output."""
        layer, router = pair
        router.expert = expert
        layer.zero_grad()
        batch = x.detach().requires_grad_()
        start = time.perf_counter()
        out = layer(batch).hidden
        out.sum().backward()
        return time.perf_counter() - start, out.detach()

    def compute(self, counts: Tensor) -> float:
        """Seconds of the experts alone, with rows that are there."""
        rows = torch.randn(int(counts.sum()), self.sizes.dim).requires_grad_()
        experts = self.part[0].experts
        experts.zero_grad()
        return seconds(lambda: experts(rows, counts).sum().backward())

    def messages(self, expert: Tensor) -> float:
        """Seconds of the way to the experts and back, without them."""
        dispatcher, router = PackedDispatcher(self.exchange), self.part[1]
        router.expert = expert
        batch = self.x[self.own].detach().requires_grad_()
        routing = router(batch)

        def there_and_back() -> None:
            sent = dispatcher.dispatch(batch, routing)
            dispatcher.combine(sent.rows, routing, sent.handle).sum().backward()

        return seconds(there_and_back)

    def round(self, expert: Tensor) -> dict[str, float]:
        """Seconds of the slowest rank, of everything in turn."""
        counts = torch.bincount(expert.flatten(), minlength=self.sizes.experts).view(self.ranks, self.here)
        took: dict[str, float] = {"rows": float(counts.sum(1).max())}
        one, out = 0.0, torch.empty_like(self.x)
        if self.rank == 0:
            torch.set_num_threads(self.ranks)
            one, out = self.step(self.whole, self.x, expert)
            torch.set_num_threads(1)
        took["one"] = slowest(one)
        dist.broadcast(out, 0)
        dist.barrier()
        every, mine = self.step(self.part, self.x[self.own], expert[self.own])
        if not torch.allclose(out[self.own], mine, rtol=1e-3, atol=1e-4):
            raise SystemExit("refusing to report: the outputs of one process and of all differ")
        took["all"] = slowest(every)
        took["compute"] = slowest(self.compute(counts[self.rank]))
        took["exchange"] = slowest(self.messages(expert[self.own]))
        return took


def layers(sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of the table; a rank of the group."""
    group, rows = Rank(sizes), []
    for k in (1, 2):
        for load in LOADS:
            rounds = [group.round(prescribed(load, n, sizes, k, group.ranks)) for n in range(sizes.rounds + 1)]
            median = {name: statistics.median(took[name] for took in rounds[1:]) for name in rounds[0]}
            rows.append({"k": k, "load": load, **median})
    return rows


class Network(nn.Module):
    """Logits of the tokens that follow; a module whose forward is everything, as FSDP2 wants it."""

    def __init__(self, model: DecoderOnly) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Float[B, T, V] of Int64[B, T]."""
        return self.model.logits(self.model.decode(ids).hidden)


class Model(L.LightningModule):
    """A language model, sparse in every other block or dense; steps on random tokens, whose times it keeps."""

    def __init__(self, sizes: Sizes, *, sparse: bool, shard: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        dim, hidden, self.shard = sizes.dim // 2, sizes.hidden // 2, shard

        def feed_forward(layer: int, side: Any) -> nn.Module:
            if not sparse or layer % 2 == 0:
                return MLP(dim, hidden)
            return MoELayer(switch(dim, sizes.experts, capacity_factor=None), GroupedMLP(sizes.experts, dim, hidden))

        self.network = Network(DecoderOnly(512, dim, 4, 4, hidden, feed_forward=feed_forward))
        self.times: list[float] = []

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
        return F.cross_entropy(self.network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        self.times.append(time.perf_counter() - self.started)


class Tokens(Dataset[Tensor]):
    """Sequences of random tokens."""

    def __init__(self, number: int) -> None:
        self.ids = torch.randint(1, 512, (number, 65), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def step_seconds(model: Model, sizes: Sizes, batch: int, **options: Any) -> float:
    """The median step of a short training."""
    with quiet():
        trainer = L.Trainer(
            max_steps=sizes.steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
        )  # fmt: skip
        trainer.fit(model, DataLoader(Tokens(batch * sizes.steps), batch_size=batch))
    return statistics.median(model.times[1:])


def trainers(sizes: Sizes) -> list[dict[str, Any]]:
    """Seconds of a step by arm, each twice in turn; a rank of the group."""
    ranks = dist.get_world_size()
    sequences = max(sizes.tokens // 64, ranks)
    many: dict[str, Any] = {"devices": ranks, "plugins": [JoinedProcesses()]}
    arms: dict[str, Callable[[], float]] = {
        "dense twin, DDP": lambda: step_seconds(
            Model(sizes, sparse=False), sizes, sequences // ranks, strategy="ddp", **many
        ),
        "dense twin, FSDP2": lambda: step_seconds(
            Model(sizes, sparse=False, shard=True),
            sizes,
            sequences // ranks,
            strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
            **many,
        ),
    }
    for stage in (0, 1, 2, 3):
        arms[f"experts divided, ZeRO {stage}"] = lambda stage=stage: step_seconds(  # type: ignore[misc]
            Model(sizes, sparse=True),
            sizes,
            sequences // ranks,
            strategy=ExpertParallelStrategy(ranks, zero_stage=stage),
            **many,
        )
    found: dict[str, list[float]] = {}
    for _ in range(2):
        for name, arm in arms.items():
            found.setdefault(name, []).append(slowest(arm()))
    return [{"arm": name, "seconds": min(values)} for name, values in found.items()]


def alone(sizes: Sizes, threads: int) -> dict[str, float]:
    """Seconds of a step of one process with as many threads, sparse and dense."""
    torch.set_num_threads(threads)
    sequences = max(sizes.tokens // 64, threads)
    found: dict[str, list[float]] = {}
    for _ in range(2):
        for name, sparse in (("one process", True), ("one process, dense twin", False)):
            found.setdefault(name, []).append(step_seconds(Model(sizes, sparse=sparse), sizes, sequences, devices=1))
    return {name: min(values) for name, values in found.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="processes that share the experts (default 2)")
    parser.add_argument("--trainer", action="store_true", help="also steps of a model under the strategy")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--rounds", type=int, help=f"counted rounds (default {Sizes.rounds})")
    parser.add_argument("--json", type=Path, help="write the results, environment and commit too")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    if options.processes < 2 or sizes.experts % options.processes:
        parser.error(f"--processes must be 2 or more and divide {sizes.experts} experts: got {options.processes}")
    found: dict[str, Any] = {
        "environment": environment(), "processes": options.processes, "sizes": dataclasses.asdict(sizes),
    }  # fmt: skip
    found["layer"] = run_distributed(layers, options.processes, sizes, timeout=1800)[0]
    print(f"{options.processes} processes with one thread each, over one process with {options.processes} threads")
    print(f"{'load':<15} k  rows of busiest  one, ms  all, ms  ratio  compute  exchange   rest")
    for row in found["layer"]:
        one, every, compute, exchange = (row[name] * 1e3 for name in ("one", "all", "compute", "exchange"))
        print(
            f"{row['load']:<15} {row['k']}  {row['rows']:>15,}  {one:7.1f}  {every:7.1f}  {every / one:5.2f}"
            f"  {compute / every:6.0%}  {exchange / every:7.0%}  {1 - (compute + exchange) / every:5.0%}"
        )
    if options.trainer:
        found["trainer"] = run_distributed(trainers, options.processes, sizes, timeout=1800)[0]
        found["alone"] = run_distributed(alone, 1, sizes, options.processes, timeout=600)[0]
        for name, value in found["alone"].items():
            print(f"{name:<28} {value * 1e3:8.1f} ms a step")
        for row in found["trainer"]:
            print(f"{row['arm']:<28} {row['seconds'] * 1e3:8.1f} ms a step")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
