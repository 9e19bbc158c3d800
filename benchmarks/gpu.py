"""All that a GPU must show, in one call of under ten minutes: kernels against references, layers, a step, generation.

    python benchmarks/gpu.py --json gpu.json                  # on the GPU
    python benchmarks/gpu.py --parts layer --json gpu.json    # one part of it
    python benchmarks/gpu.py --toy --json toy.json            # seconds on a CPU, to see that it works

Parts, in this order; each has a share of --seconds, and the file is written after every row, so that a cut loses none:

- kernels: each Triton operation at real sizes against its reference, outputs and gradients, float32, fp16 and bf16.
- layer: gated experts of five shapes in bf16, from tokens with their routing to tokens, forward and backward apart:
  by Triton, by torch, beside a dense feed-forward of the same active work (the floor), a plain layer around
  `torch.nn.functional.grouped_mm`, and ScatterMoE and SonicMoE where they are installed. Arms take turns in every
  round; TFLOP/s are those of the products, from the median. An arm whose output or input gradient is not that of
  torch's arm is named and gets no number.
- tiles: Triton's products of the first shape by several shapes of tiles, for the table in `tiles_for`.
- step: a training step of a sparse language model by Triton and by torch, beside its dense twin.
- generate: greedy continuation by the same models.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import counted, written
from torch import Tensor, nn

from moekit import MoELayer, use_backend
from moekit.dispatch import PackedDispatcher
from moekit.environment import environment
from moekit.errors import UserError
from moekit.experts import GroupedGLU
from moekit.experts.fused import weighted_sum
from moekit.inference import complete
from moekit.kernels import grouped_mm_reference
from moekit.kernels.gpu import feed_forward, products, router, rows
from moekit.kernels.gpu.backend import choose
from moekit.kernels.gpu.hidden import hidden_units
from moekit.kernels.gpu.tiles import Tiles
from moekit.planner.measure import product_rate
from moekit.routers import TopKRouter
from moekit.routing import Routing
from moekit.transformer import GLU, DecoderOnly, every_other


@dataclass(frozen=True)
class Shape:
    """A layer: T tokens of width D, E experts of hidden size F, K choices."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int

    @property
    def flops(self) -> int:
        """Of the products of a forward: three matrices; a backward has twice as many."""
        return 6 * self.tokens * self.k * self.dim * self.hidden


SHAPES = (
    Shape(32768, 4096, 2048, 64, 4),
    Shape(32768, 4096, 512, 128, 8),
    Shape(24576, 1536, 256, 128, 8),
    Shape(16384, 2048, 8192, 8, 1),
    Shape(16384, 2048, 8192, 8, 2),
)
TOY = (Shape(24, 16, 24, 4, 2), Shape(24, 16, 24, 4, 1))
SHARES = {"kernels": 0.2, "layer": 0.5, "tiles": 0.1, "step": 0.1, "generate": 0.1}
"""Of the whole time; what a part leaves over goes to those that follow."""


class Report:
    """What was found so far, printed and written after every row."""

    def __init__(self, file: Path | None, facts: dict[str, Any]) -> None:
        self.file, self.facts = file, facts
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row to a part."""
        self.rows.setdefault(part, []).append(row)
        print(f"{part}: {json.dumps(row)}", flush=True)
        if self.file is not None:
            self.file.write_text(json.dumps({**self.facts, **self.rows}, indent=1) + "\n", encoding="utf-8")


class Clock:
    """Time of a device: events on a GPU, the processor's time else."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """A point in the stream of work."""
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds; waits for the work."""
        if not self.on_gpu:
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1000


@dataclass(frozen=True)
class Arm:
    """One way to compute a layer, and the weights whose gradients a backward makes."""

    run: Callable[[Tensor], Tensor]
    weights: Sequence[Tensor]


@dataclass
class Options:
    """What every part is told."""

    device: torch.device
    dtype: torch.dtype
    toy: bool
    rounds: int

    @property
    def clock(self) -> Clock:
        """Of the device."""
        return Clock(self.device)


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance over size; infinite where a number is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    distance = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(distance.nan_to_num(nan=torch.inf))


def obstacle(options: Options, dtype: torch.dtype) -> str:
    """Why Triton cannot compute here; empty if it can."""
    try:
        choose("triton", torch.zeros(1, device=options.device, dtype=dtype), "layer")
    except UserError as error:
        return str(error)
    return ""


# -- kernels -------------------------------------------------------------------------------------------------------


def kernels(options: Options) -> Iterator[dict[str, Any]]:
    """The largest error of each operation and type, over outputs and gradients, and whether it is small enough."""
    tolerance = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        reason = obstacle(options, dtype)
        if reason:
            yield {"dtype": str(dtype), "skipped": reason}
            continue
        for name, errors in (
            ("grouped product", product_errors), ("layer", layer_errors), ("permute, unpermute", rows_errors),
        ):  # fmt: skip
            error = max(errors(options, dtype))
            yield {"operation": name, "dtype": str(dtype), "error": error, "right": error < tolerance[dtype]}
    if not obstacle(options, torch.float32):
        error = max(router_errors(options))
        yield {"operation": "top-k router", "dtype": "torch.float32", "error": error, "right": error < 1e-4}


def both(fast: Callable[..., Tensor], slow: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Iterator[float]:
    """Errors of the output and of all gradients; the slow form in float32."""
    found = []
    for form, leaves in ((fast, [t.detach() for t in inputs]), (slow, [t.detach().float() for t in inputs])):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = form(*leaves)
        probe = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, probe)])
    yield from (relative(one, other) for one, other in zip(*found, strict=True))


def product_errors(options: Options, dtype: torch.dtype) -> Iterator[float]:
    """Experts with no row, one row and many, sizes that fit no tile."""
    counts = [7, 0, 1, 33] if options.toy else [7000, 0, 1, 333, 1280, 0, 10000, 14]
    d, f = (12, 42) if options.toy else (1032, 2730)
    x = torch.randn(sum(counts), d, device=options.device).to(dtype)
    weight = (torch.randn(len(counts), d, f, device=options.device) / d**0.5).to(dtype)
    count = torch.tensor(counts, device=options.device)
    return both(
        lambda a, b: products.grouped_mm(a, b, count), lambda a, b: grouped_mm_reference(a, b, count), [x, weight]
    )


def bank_of(shape: Shape, options: Options, dtype: torch.dtype) -> GroupedGLU:
    """Gated experts of a shape."""
    torch.manual_seed(0)
    with torch.device(options.device):
        return GroupedGLU(shape.experts, shape.dim, shape.hidden, activation="silu").to(dtype)


def routing_of(shape: Shape, options: Options) -> Routing:
    """A random routing without drops, by torch."""
    torch.manual_seed(1)
    with torch.device(options.device), torch.no_grad():
        chooser = TopKRouter(shape.dim, shape.experts, shape.k, renormalise="before_drop" if shape.k > 1 else "none")
        use_backend(chooser, "torch")
        return chooser(torch.randn(shape.tokens, shape.dim))


def layer_errors(options: Options, dtype: torch.dtype) -> Iterator[float]:
    """Experts by Triton against the packed layer in float32."""
    shape = TOY[0] if options.toy else Shape(4096, 1032, 682, 16, 4)
    bank, routing = bank_of(shape, options, dtype), routing_of(shape, options)
    order = rows.row_order(routing)
    wide = bank_of(shape, options, torch.float32)
    use_backend(wide, "torch")

    def slow(x: Tensor, weight: Tensor, *matrices: Tensor) -> Tensor:
        given = dict(zip(bank.matrices, matrices, strict=True))
        dispatched = PackedDispatcher().dispatch(x, routing)
        y = torch.func.functional_call(wide, given, (dispatched.rows, dispatched.counts))
        replaced = Routing(**{**vars(routing), "weight": weight})
        return PackedDispatcher().combine(y, replaced, dispatched.handle)

    x = torch.randn(shape.tokens, shape.dim, device=options.device).to(dtype)
    return both(
        lambda x, weight, gate, up, out: feed_forward.feed_forward(x, weight, gate, up, out, order, "silu"),
        slow, [x, routing.weight, bank.w_gate, bank.w_up, bank.w_out],
    )  # fmt: skip


def rows_errors(options: Options, dtype: torch.dtype) -> Iterator[float]:
    """Rows sorted, and summed again."""
    shape = TOY[0] if options.toy else Shape(20000, 1032, 8, 64, 4)
    routing = routing_of(shape, options)
    order = rows.row_order(routing)
    x = torch.randn(shape.tokens, shape.dim, device=options.device).to(dtype)
    y = torch.randn(shape.tokens * shape.k, shape.dim, device=options.device).to(dtype)
    yield from both(lambda a: rows.permute(a, order), lambda a: rows.permute_reference(a, order), [x])
    yield from both(
        lambda a, w: rows.unpermute(a, w, order), lambda a, w: rows.unpermute_reference(a, w, order),
        [y, routing.weight],
    )  # fmt: skip


def router_errors(options: Options) -> Iterator[float]:
    """Choices and places exactly, sums and gradient nearly."""
    tokens, experts, k = (40, 5, 2) if options.toy else (100_003, 130, 8)
    logits = 3 * torch.randn(tokens, experts, device=options.device)
    mask = torch.rand(tokens, device=options.device) > 0.1
    found = []
    for form in (router.topk, router.topk_reference):
        leaf = logits.clone().requires_grad_()
        result = form(leaf, k, mask)
        probe = torch.sin(torch.arange(k * tokens, device=options.device)).view(k, tokens) * mask
        (grad,) = torch.autograd.grad((result.weight * probe).sum() + result.router_z, leaf)
        found.append([*(t[:, mask] for t in result[:3]), *(t.detach() for t in result[3:]), grad])
    yield from (relative(one, other) for one, other in zip(*found, strict=True))


# -- layer ---------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """One gated feed-forward that does the same products for every token."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        wide = shape.k * shape.hidden
        with torch.device(device):
            self.gate_up = nn.Parameter((torch.randn(2 * wide, shape.dim) / shape.dim**0.5).to(dtype))
            self.out = nn.Parameter((torch.randn(shape.dim, wide) / wide**0.5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Float[T, D]."""
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, self.out)


def plain_layer(bank: GroupedGLU, routing: Routing, k: int) -> Arm:
    """What one writes around `grouped_mm` in an afternoon: sort, gather, three products, scatter."""
    w_in = torch.cat([bank.w_gate, bank.w_up], dim=2).detach().requires_grad_()
    w_out = bank.w_out.detach().clone().requires_grad_()

    def run(x: Tensor) -> Tensor:
        order = routing.expert.argsort(stable=True)
        token = routing.token[order]
        ends = torch.bincount(routing.expert, minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[token], w_in, offs=ends).chunk(2, dim=1)
        y = F.grouped_mm(F.silu(gate) * up, w_out, offs=ends)
        weighed = y * routing.weight[order].to(y.dtype)[:, None]
        return torch.zeros_like(x).index_add(0, token, weighed)

    return Arm(run, [w_in, w_out])


def scattermoe(bank: GroupedGLU, routing: Routing, k: int) -> Arm:
    """ScatterMoE's gated layer with the same weights and choices."""
    mlp = importlib.import_module("scattermoe.mlp")
    layer = mlp.GLUMLP(bank.dim, bank.hidden_dim, bank.num_experts, k, activation=nn.SiLU())
    layer = layer.to(bank.w_out.device, bank.w_out.dtype)
    with torch.no_grad():  # its second half is the gate
        layer.experts.weight.copy_(torch.cat([bank.w_up, bank.w_gate], dim=2).transpose(1, 2))
        layer.output_experts.weight.copy_(bank.w_out.transpose(1, 2))
    weight, expert = (t.view(k, -1).t().contiguous() for t in (routing.weight, routing.expert))
    return Arm(lambda x: layer(x, weight.to(x.dtype), expert), list(layer.parameters()))


def by_backend(backend: Any) -> Callable[[GroupedGLU, Routing, int], Arm]:
    """Our experts, by name of the backend."""

    def make(bank: GroupedGLU, routing: Routing, k: int) -> Arm:
        copy = GroupedGLU(bank.num_experts, bank.dim, bank.hidden_dim, activation="silu")
        copy = copy.to(bank.w_out.device, bank.w_out.dtype)
        copy.load_state_dict(bank.state_dict())
        use_backend(copy, backend)
        packed = PackedDispatcher()

        def run(x: Tensor) -> Tensor:
            whole = weighted_sum(copy, x, routing)
            if whole is not None:
                return whole
            sent = packed.dispatch(x, routing)
            return packed.combine(copy(sent.rows, sent.counts), routing, sent.handle).to(x.dtype)

        return Arm(run, list(copy.parameters()))

    return make


ARMS: dict[str, Callable[[GroupedGLU, Routing, int], Arm]] = {
    "torch": by_backend("torch"),
    "triton": by_backend("triton"),
    "grouped_mm": plain_layer,
    "scattermoe": scattermoe,
    "sonicmoe": by_backend("sonicmoe"),
}


def layer(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each shape."""
    rate = product_rate(options.device.type, options.dtype)
    for shape in TOY if options.toy else SHAPES:
        bank, routing = bank_of(shape, options, options.dtype), routing_of(shape, options)
        x = torch.randn(shape.tokens, shape.dim, device=options.device).to(options.dtype)
        grad = torch.randn_like(x)
        dense = Dense(shape, options.device, options.dtype)
        arms: dict[str, Arm] = {"dense": Arm(dense, list(dense.parameters()))}
        left_out: dict[str, str] = {}
        expected: list[Tensor] = []
        for name, make in ARMS.items():
            try:
                arm = make(bank, routing, shape.k)
                leaf = x.clone().requires_grad_()
                out = arm.run(leaf)
                found = [out.detach(), *torch.autograd.grad(out, leaf, grad)]
                expected = expected or found
                worst = max(relative(one, other) for one, other in zip(found, expected, strict=True))
                if worst > 0.03:
                    left_out[name] = f"its results are not torch's: off by {worst:.1e}"
                else:
                    arms[name] = arm
            except Exception as error:  # not installed, not for this device, out of memory: the others go on
                left_out[name] = f"{type(error).__name__}: {error}"[:300]
        del expected
        yield {"shape": vars(shape), "arms": timed(arms, x, grad, shape, rate, options), "left_out": left_out,
               "product_tflops": rate / 1e12}  # fmt: skip


def timed(
    arms: dict[str, Arm], x: Tensor, grad: Tensor, shape: Shape, rate: float, options: Options
) -> dict[str, dict[str, float | None]]:
    """Median and least seconds of forward and backward, TFLOP/s, shares, peak memory; arms in turn in every round."""
    clock = options.clock
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    peaks: dict[str, float | None] = dict.fromkeys(arms)
    for number in range(options.rounds + 2):
        for name, arm in arms.items():
            leaf = x.detach().requires_grad_()
            for weight in arm.weights:
                weight.grad = None  # written, not added
            if clock.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            begin = clock.mark()
            out = arm.run(leaf)
            middle = clock.mark()
            out.backward(grad)
            end = clock.mark()
            pair = clock.between(begin, middle), clock.between(middle, end)
            if number >= 2:  # two rounds to compile and to warm up
                seconds[name].append(pair)
            if clock.on_gpu:
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    table = {}
    floor = [sum(pair) for pair in seconds["dense"]]
    for name, pairs in seconds.items():
        forward, backward = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        ratio = statistics.median(sum(pair) / one for pair, one in zip(pairs, floor, strict=True))
        table[name] = {
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * backward,
            "least_ms": 1e3 * min(map(sum, pairs)),
            "forward_tflops": shape.flops / forward / 1e12,
            "backward_tflops": 2 * shape.flops / backward / 1e12,
            "share_of_product_rate": 3 * shape.flops / (forward + backward) / rate,
            "over_dense": ratio,
            "peak_gib": peaks[name],
        }
    return table


# -- tiles ---------------------------------------------------------------------------------------------------------


def tiles(options: Options) -> Iterator[dict[str, Any]]:
    """TFLOP/s of products by shape of tiles: which one `tiles_for` should name."""
    shape = TOY[0] if options.toy else SHAPES[0]
    reason = obstacle(options, options.dtype)
    if reason:
        yield {"skipped": reason}
        return
    routing = routing_of(shape, options)
    order, bank = rows.row_order(routing), bank_of(shape, options, options.dtype)
    x = torch.randn(shape.tokens, shape.dim, device=options.device).to(options.dtype)
    wide = torch.randn(shape.tokens * shape.k, shape.hidden, device=options.device).to(options.dtype)
    forms: dict[str, tuple[int, Callable[[Tiles], Any]]] = {
        "hidden_units": (2, lambda b: hidden_units(
            x, bank.w_gate, bank.w_up, order.counts, order.token, "silu", keep=True, tiles=b)),
        "product": (1, lambda b: products.product(wide, bank.w_out, order.counts, tiles=b)),
        "matrix_grad": (1, lambda b: products.matrix_grad(x, wide, order.counts, x_source=order.token, tiles=b)),
    }  # fmt: skip
    small = [Tiles(16, 64, 16, 4, 2)]
    large = [
        Tiles(rows_, columns, 64, warps, stages)
        for rows_, columns, warps in ((128, 128, 8), (128, 256, 8), (64, 256, 8), (128, 64, 4), (64, 128, 4))
        for stages in (3, 4)
    ]
    for name, (matrices, form) in forms.items():
        for one in small if options.toy else large:
            row: dict[str, Any] = {"operation": name, "tiles": one}
            try:
                with torch.no_grad():
                    form(one)
                    times = []
                    for _ in range(options.rounds):
                        begin = options.clock.mark()
                        form(one)
                        times.append(options.clock.between(begin, options.clock.mark()))
                row["tflops"] = matrices * shape.flops / 3 / statistics.median(times) / 1e12
            except Exception as error:  # too much shared memory, too few registers
                row["left_out"] = f"{type(error).__name__}: {error}"[:200]
            yield row


# -- step and generation -------------------------------------------------------------------------------------------


def models(options: Options) -> tuple[dict[str, DecoderOnly], int]:
    """Language models and their vocabulary: sparse by Triton and by torch with the same weights, and the dense twin."""
    vocab, dim, heads, layers, hidden, experts, k = (
        (64, 16, 2, 2, 16, 4, 2) if options.toy else (32000, 1024, 16, 8, 1024, 32, 4)
    )

    def sparse(layer_number: int, side: str) -> nn.Module:
        return MoELayer(
            TopKRouter(dim, experts, k, renormalise="before_drop"), GroupedGLU(experts, dim, hidden, activation="silu")
        )

    made = {}
    for name in ("torch", "triton", "dense"):
        if name == "triton" and obstacle(options, options.dtype):
            continue
        torch.manual_seed(0)
        factory = every_other(sparse, lambda i, side: GLU(dim, k * hidden, activation="silu"))
        if name == "dense":
            factory = every_other(lambda i, side: GLU(dim, k * hidden, activation="silu"))
        with torch.device(options.device):
            made[name] = DecoderOnly(vocab, dim, heads, layers, k * hidden, feed_forward=factory)
        if name != "dense":
            use_backend(made[name], name)  # type: ignore[arg-type]
    return made, vocab


def step(options: Options) -> Iterator[dict[str, Any]]:
    """Tokens per second of forward, backward and AdamW under bf16 autocast; losses of the two backends must agree."""
    built, vocab = models(options)
    sentences, length = (2, 8) if options.toy else (16, 1024)
    torch.manual_seed(2)
    ids = torch.randint(3, vocab, (sentences, length + 1), device=options.device)
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in built.items()}
    seconds: dict[str, list[float]] = {name: [] for name in built}
    losses: dict[str, list[float]] = {name: [] for name in built}
    for number in range(options.rounds + 2):
        for name, model in built.items():
            begin = options.clock.mark()
            with torch.autocast(options.device.type, torch.bfloat16, enabled=options.device.type == "cuda"):
                output = model.decode(ids[:, :-1])
                logits = model.logits(output.hidden)
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 0.01 * sum(r.losses["load_balance"] for r in output.routings if r is not None)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            took = options.clock.between(begin, options.clock.mark())
            if number >= 2:
                seconds[name].append(took)
            losses[name].append(float(loss.detach()))
    if "triton" in losses and abs(losses["triton"][0] - losses["torch"][0]) > 0.02:
        yield {"refused": "the first losses of the two backends differ", "losses": losses}
        return
    rate = {name: sentences * length / statistics.median(values) for name, values in seconds.items()}
    yield {"tokens_per_second": rate, "first_loss": {n: v[0] for n, v in losses.items()},
           "over_dense": {name: rate["dense"] / value for name, value in rate.items()}}  # fmt: skip


def generate(options: Options) -> Iterator[dict[str, Any]]:
    """New tokens per second of greedy continuation in the model's own type."""
    built, vocab = models(options)
    prompts, new = (2, 3) if options.toy else (64, 64)
    torch.manual_seed(3)
    ids = torch.randint(3, vocab, (prompts, 8), device=options.device)
    kind = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for number in range(3):
        for name, model in built.items():
            begin = time.perf_counter()
            found = complete(model.to(kind), ids, max_new_tokens=new, suppress=[0, 1, 2])
            found.ids.cpu()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    yield {"tokens_per_second": {name: prompts * new / min(values) for name, values in seconds.items()}}


PARTS: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "kernels": kernels, "layer": layer, "tiles": tiles, "step": step, "generate": generate,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a CPU too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing new is begun (default 540)")
    parser.add_argument("--rounds", type=counted, help="counted rounds (default 20; toy 1)")
    parser.add_argument("--json", type=written, help="where the results go")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.toy:
        parser.error("there is no GPU that torch sees: give --toy to see that the script works.")
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = Options(device, dtype, given.toy, given.rounds or (1 if given.toy else 20))
    report = Report(given.json, {"environment": environment(), "dtype": str(dtype), "toy": given.toy})
    begun, ends, wrong = time.monotonic(), 0.0, False
    for part in PARTS:
        ends += SHARES[part] * given.seconds
        if part not in given.parts:
            continue
        try:
            for row in PARTS[part](options):
                report.add(part, row)
                wrong = wrong or row.get("right") is False or "refused" in row
                if time.monotonic() - begun > ends:
                    report.add(part, {"cut": f"its share of {given.seconds:.0f} seconds is used up"})
                    break
        except Exception as error:  # the parts that follow are worth as much without it
            report.add(part, {"failed": f"{type(error).__name__}: {error}"})
            wrong = True
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
