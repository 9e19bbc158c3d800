"""Expert parallelism on processes of one machine: wall time beside one process, where it goes, and uneven loads.

Layer: one sparse feed-forward, forward and backward, dropless, of which W processes with one thread each hold E / W
experts; beside it one process with W threads and all experts, for the same tokens. Experts are prescribed and not
learned, so that the load is known: balanced, half of the first choices to one expert, everything to one rank, nothing
to one rank, and a hot expert that moves every round. Both take turns; where their outputs differ, nothing is reported.
Of the wall time, "compute" is the experts' work of the busiest process alone, "exchange" the same messages without it;
"rest" is waiting and what routing and gathering take.

Overlap (--overlap, instead of the layer): a layer with a shared branch of an expert's size, balanced load, whose rows
travel while that branch is computed, beside the same layer that waits for them first.

Trainer (--trainer, instead of the layer): steps of a small language model under `ExpertParallelStrategy` with ZeRO 0 to
3, beside Lightning's DDP and FSDP2 of its dense twin, and one process: see `expert_parallel_steps.py`.

    python benchmarks/expert_parallel.py                        # the layer, 2 processes
    python benchmarks/expert_parallel.py --processes 4 --loads balanced
    python benchmarks/expert_parallel.py --overlap
    python benchmarks/expert_parallel.py --trainer              # steps
    python benchmarks/expert_parallel.py --quick                # toy sizes: does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from expert_parallel_steps import Shape, merged, round_of, table
from interleaved import counted, written
from torch import Tensor, nn

from moekit import MoELayer
from moekit.dispatch import AllToAll, PackedDispatcher
from moekit.environment import environment
from moekit.experts import GroupedMLP
from moekit.performance import keep_memory
from moekit.routers.queueing import routing_of_choices
from moekit.routing import Router, Routing, RoutingContext
from moekit.testing import run_distributed
from moekit.transformer import MLP

LOADS = ("balanced", "hot expert", "hot rank", "empty rank", "moving hotspot")


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured; tokens are those of all processes together."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 2048
    experts: int = 8
    rounds: int = 8


STEPS = Shape(tokens=4096, dim=256, hidden=1024, experts=8)
QUICK_STEPS = Shape(tokens=256, dim=16, hidden=32, experts=4, steps=2)
QUICK = Sizes(tokens=64, dim=8, hidden=16, experts=4, rounds=2)


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


def overlap(sizes: Sizes) -> list[dict[str, Any]]:
    """Milliseconds of a step that overlaps and of one that waits, in turn; a rank of the group."""
    keep_memory()
    rank, ranks, rows = dist.get_rank(), dist.get_world_size(), []
    here, own = sizes.experts // ranks, slice(rank * sizes.tokens // ranks, (rank + 1) * sizes.tokens // ranks)
    x = torch.randn(sizes.tokens, sizes.dim, generator=torch.Generator().manual_seed(1))[own]
    assert dist.group.WORLD is not None
    for k in (1, 2):
        arms = {}
        for name, asynchronous in (("waits", False), ("overlaps", True)):
            layer, router = layer_of(sizes, rank * here, here)
            torch.manual_seed(0)
            layer.shared = MLP(sizes.dim, sizes.hidden)
            layer.connect(AllToAll(dist.group.WORLD, overlap=asynchronous))
            router.expert = prescribed("balanced", 0, sizes, k, ranks)[own]
            arms[name] = layer
        took: dict[str, list[float]] = {name: [] for name in arms}
        outputs: dict[str, Tensor] = {}
        for _ in range(sizes.rounds + 2):
            for name, layer in arms.items():
                layer.zero_grad()
                batch = x.detach().requires_grad_()
                dist.barrier()
                start = time.perf_counter()
                out = layer(batch).hidden
                out.sum().backward()
                took[name].append(slowest(time.perf_counter() - start))
                outputs[name] = out.detach()
        if not torch.equal(*outputs.values()):
            raise SystemExit("refusing to report: what overlaps and what waits differ")
        waits, overlaps = took["waits"][2:], took["overlaps"][2:]
        ratio = statistics.median(b / a for a, b in zip(waits, overlaps, strict=True))
        rows.append(
            {"k": k, "waits": statistics.median(waits), "overlaps": statistics.median(overlaps), "ratio": ratio}
        )
    return rows


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


def layers(sizes: Sizes, loads: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table; a rank of the group."""
    keep_memory()
    group, rows = Rank(sizes), []
    for k in (1, 2):
        for load in loads:
            rounds = [group.round(prescribed(load, n, sizes, k, group.ranks)) for n in range(sizes.rounds + 1)]
            median = {name: statistics.median(took[name] for took in rounds[1:]) for name in rounds[0]}
            rows.append({"k": k, "load": load, **median})
    return rows


def print_layers(found: list[dict[str, Any]], processes: int) -> None:
    """The layer's table."""
    print(f"{processes} processes with one thread each, over one process with {processes} threads")
    print(f"{'load':<15} k  rows of busiest  one, ms  all, ms  ratio  compute  exchange   rest")
    for row in found:
        one, every, compute, exchange = (row[name] * 1e3 for name in ("one", "all", "compute", "exchange"))
        print(
            f"{row['load']:<15} {row['k']}  {row['rows']:>15,}  {one:7.1f}  {every:7.1f}  {every / one:5.2f}"
            f"  {compute / every:6.0%}  {exchange / every:7.0%}  {1 - (compute + exchange) / every:5.0%}"
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="processes that share the experts (default 2)")
    parser.add_argument("--overlap", action="store_true", help="a layer with a shared branch, not the layer alone")
    parser.add_argument("--trainer", action="store_true", help="steps of a model under the strategy, not the layer")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS, help="only these loads of the layer")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    about = f"counted rounds (default {Sizes.rounds} of the layer, 2 of steps)"
    parser.add_argument("--rounds", type=counted, help=about)
    parser.add_argument("--json", type=written, help="write the results, environment and commit too")
    options = parser.parse_args()
    sizes, shape = (QUICK, QUICK_STEPS) if options.quick else (Sizes(), STEPS)
    if options.processes < 2 or sizes.experts % options.processes:
        parser.error(f"--processes must be 2 or more and divide {sizes.experts} experts: got {options.processes}")
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    found: dict[str, Any] = {"environment": environment(), "processes": options.processes}
    if options.trainer:
        rounds = [round_of(shape, options.processes) for _ in range(options.rounds or (1 if options.quick else 2))]
        found |= {"shape": dataclasses.asdict(shape), "trainer": merged(rounds)}
        print(f"{options.processes} processes with one thread each, {shape}")
        print(table(found["trainer"]))
    elif options.overlap:
        rows = run_distributed(overlap, options.processes, sizes, timeout=1800)[0]
        found |= {"sizes": dataclasses.asdict(sizes), "overlap": rows}
        print(f"{options.processes} processes with one thread each, a layer with a shared branch, balanced")
        print("k  waits, ms  overlaps, ms  ratio")
        for row in rows:
            print(f"{row['k']}  {row['waits'] * 1e3:9.1f}  {row['overlaps'] * 1e3:12.1f}  {row['ratio']:5.2f}")
    else:
        rows = run_distributed(layers, options.processes, sizes, options.loads, timeout=1800)[0]
        found |= {"sizes": dataclasses.asdict(sizes), "layer": rows}
        print_layers(rows, options.processes)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
