"""Triton's kernels in Triton's interpreter: a program, for the interpreter must be chosen before Triton is imported.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py

Prints JSON: for each case "" or what is wrong. New tensors hold NaN, so that what no kernel wrote shows.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.experts import GroupedGLU, GroupedMLP
from moekit.functional.activation import activation_function
from moekit.kernels import grouped_mm, grouped_mm_reference
from moekit.kernels.gpu import feed_forward, hidden, products, proof, router, rows, tiles
from moekit.kernels.gpu.backend import choose, use_backend
from moekit.kernels.gpu.language import is_interpreted
from moekit.layer import MoELayer
from moekit.routers import InputJitter, TopKRouter
from moekit.routers.queueing import routing_of_choices
from moekit.routing import Capacity, Routing, RoutingContext

DIM, HIDDEN = 12, 42  # no multiple of any tile
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CASES: dict[str, Callable[[], None]] = {}


def case(*parameters: Any, name: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Every tuple of parameters is a case."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for values in parameters or ((),):
            key = " ".join([name or function.__name__, *(str(v).removeprefix("torch.") for v in values)])
            CASES[key] = lambda values=values: function(*values)
        return function

    return add


def poison() -> None:
    """New memory holds NaN, and numbers that no index may have."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            out = make(*arguments, **options)
            return out.fill_(math.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))


def same(fast: Tensor, slow: Tensor, what: str, tolerance: float) -> None:
    assert fast.shape == slow.shape, f"{what}: {tuple(fast.shape)} instead of {tuple(slow.shape)}"
    if fast.dtype in (torch.int64, torch.bool):
        assert torch.equal(fast, slow), f"{what}: {fast.tolist()} instead of {slow.tolist()}"
        return
    error = float((fast.double() - slow.double()).norm())
    assert error <= tolerance * (float(slow.double().norm()) + 1e-3), f"{what}: off by {error:.2e}"


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    probe = torch.cos(torch.arange(out.numel(), dtype=torch.float32)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, probe, allow_unused=False)]


def compare(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> list[Tensor]:
    """Outputs and gradients of all inputs; the slow form computes in float32. Returns the fast form's gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found, expected = with_gradients(fast(*leaves), leaves), with_gradients(slow(*wide), wide)
    for name, one, other in zip(["output", *map(str, range(len(inputs)))], found, expected, strict=True):
        same(one, other, f"gradient of input {name}" if name != "output" else name, tolerance)
    for tensor, grad in zip(inputs, found[1:], strict=True):
        assert grad.dtype == tensor.dtype
    return found[1:]


COUNTS = {
    "some": [3, 0, 20], "no row": [0, 0], "one expert": [17], "only the last": [0, 0, 5], "first and last": [0, 33, 0],
}  # fmt: skip


@case(*[(n, torch.float32) for n in COUNTS], ("some", torch.bfloat16), ("some", torch.float16))
def product(counts: str, dtype: torch.dtype) -> None:
    count = torch.tensor(COUNTS[counts])
    x, weight = torch.randn(int(count.sum()), DIM).to(dtype), torch.randn(len(count), DIM, HIDDEN).to(dtype)
    compare(
        lambda a, b: products.grouped_mm(a, b, count), lambda a, b: grouped_mm_reference(a, b, count), [x, weight],
        TOLERANCE[dtype],
    )  # fmt: skip
    if counts != "some":
        return
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    found = grouped_mm(x, turned, count, "triton")
    same(found, grouped_mm_reference(x.float(), weight.float(), count), "transposed", TOLERANCE[dtype])
    leaf = weight.clone().requires_grad_()
    products.grouped_mm(x, leaf, count).sum().backward()  # an expanded gradient
    assert leaf.grad is not None
    assert not leaf.grad[count == 0].any(), "the gradient of an expert without rows must be exactly zero"


@case()
def product_with_gather_scatter_and_a_second_factor() -> None:
    count = torch.tensor([2, 0, 4])
    x, x2 = torch.randn(9, DIM), torch.randn(9, DIM)
    weight, weight2 = torch.randn(3, DIM, 20), torch.randn(3, DIM, 20)
    source, target, scale = torch.randint(9, (6,)), torch.randperm(8)[:6], torch.rand(6)
    out = torch.full((8, 20), 7.0)
    products.product(
        x, weight, count, num_rows=6, source=source, target=target, scale=scale, pair=(x2, weight2), out=out
    )
    taken = grouped_mm_reference(x[source], weight, count) + grouped_mm_reference(x2[source], weight2, count)
    expected = torch.full((8, 20), 7.0).index_copy(0, target, taken * scale[:, None])
    same(out, expected, "output", 1e-6)


def routing_of(tokens: int, k: int, load: str) -> Routing:
    """Five experts, of which the last gets nothing."""
    choice = {
        "spread": lambda: torch.stack([torch.randperm(4)[:k] for _ in range(tokens)] or [torch.empty(k)]),
        "all to one": lambda: torch.arange(k).repeat(tokens, 1),
    }[load]()[:tokens]
    return routing_of_choices(choice.long(), torch.rand(tokens, k), 5, mask=torch.arange(tokens) % 4 != 1)


@case(
    *[(k, act, glu, torch.float32) for k, act, glu in ((1, "relu", False), (2, "gelu", True), (3, "silu", True))],
    (1, "silu", True, torch.bfloat16), (2, "gelu", False, torch.bfloat16), (2, "relu", True, torch.float16),
)  # fmt: skip
def bank(k: int, activation: str, glu: bool, dtype: torch.dtype, tokens: int = 9, load: str = "spread") -> None:
    routing = routing_of(tokens, k, load)
    order = rows.row_order(routing)
    matrices = [(torch.randn(5, DIM, HIDDEN) / DIM**0.5).to(dtype) for _ in range(1 + glu)]
    inputs = [torch.randn(tokens, DIM).to(dtype), routing.weight, *matrices]
    inputs.append((torch.randn(5, HIDDEN, DIM) / HIDDEN**0.5).to(dtype))

    def arguments(x: Tensor, weight: Tensor, w_in: Tensor, *rest: Tensor) -> tuple[Any, ...]:
        return x, weight, w_in, rest[0] if glu else None, rest[-1], order

    grads = compare(
        lambda *given: feed_forward.feed_forward(*arguments(*given), activation),
        lambda *given: feed_forward.feed_forward_reference(*arguments(*given), activation_function(activation)),
        inputs,
        TOLERANCE[dtype],
    )
    for grad in grads[2:]:
        assert not grad[-1].any(), "the gradient of an expert without rows must be exactly zero"


@case((1,), (2,))
def bank_without_tokens(k: int) -> None:
    routing = routing_of(0, k, "spread")
    leaves = [t.requires_grad_() for t in (torch.ones(0, DIM), torch.ones(0), torch.ones(5, DIM, HIDDEN))]
    x, weight, w_in = leaves
    out = feed_forward.feed_forward(x, weight, w_in, None, torch.ones(5, HIDDEN, DIM), rows.row_order(routing), "relu")
    found = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == x.shape
    assert [t.shape for t in found] == [t.shape for t in leaves]
    assert not found[2].any()


@case((2,))
def bank_with_all_rows_at_one_expert(k: int) -> None:
    bank(k, "gelu", False, torch.float32, 19, "all to one")


@case((1, torch.float32), (2, torch.bfloat16), (3, torch.float32))
def permute_and_unpermute(k: int, dtype: torch.dtype) -> None:
    routing = routing_of(9, k, "spread")
    order, there = rows.row_order(routing), int(routing.kept.sum())
    x, y = torch.randn(9, 300).to(dtype), torch.randn(9 * k, 300).to(dtype)
    compare(
        lambda a: rows.permute(a, order)[:there], lambda a: rows.permute_reference(a, order)[:there], [x],
        TOLERANCE[dtype],
    )  # fmt: skip
    weight = routing.weight.masked_fill(~routing.kept, math.nan)  # what is not kept weighs nothing, whatever is there
    leaf, row = weight.clone().requires_grad_(), y.clone().requires_grad_()
    out = rows.unpermute(row, leaf, order)
    found = with_gradients(out, [row, leaf])
    wide, clean = y.float().requires_grad_(), routing.weight.clone().requires_grad_()
    expected = with_gradients(rows.unpermute_reference(wide, clean, order), [wide, clean])
    for name, one, other in zip(("output", "rows", "weight"), found, expected, strict=True):
        same(one[:there] if name == "rows" else one, other[:there] if name == "rows" else other, name, TOLERANCE[dtype])


@case((9, 5, 2, False), (40, 3, 3, True), (0, 4, 1, False), (0, 4, 1, True), (300, 33, 2, True), (7, 1, 1, False))
def top_k(tokens: int, experts: int, k: int, masked: bool) -> None:
    logits = 3 * torch.randn(tokens, experts)
    mask = torch.rand(tokens) > 0.3 if masked else None
    logits[: tokens // 3] = logits[: tokens // 3].round()  # ties
    given = logits if mask is None else logits.masked_fill(~mask[:, None], math.nan)  # padding may hold anything
    real = slice(None) if mask is None else mask
    results = []
    for form, values in ((router.topk, given), (router.topk_reference, logits)):
        leaf = values.clone().requires_grad_()
        found = form(leaf, k, mask)
        probe = torch.cos(torch.arange(k * tokens, dtype=torch.float32)).view(k, tokens)
        score = (found.weight * probe)[:, real].sum() + (found.mean_probs * torch.arange(experts)).sum()
        (grad,) = torch.autograd.grad(score + 0.7 * found.router_z, leaf)
        results.append([*(t[:, real] for t in found[:3]), *(t.detach() for t in found[3:]), grad])
    for name, fast, slow in zip([*router.TopK._fields, "gradient"], *results, strict=True):
        same(fast, slow, name, 5e-6)


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], torch.dtype | None]] = {
    "gated, two choices, renormalised": (
        lambda: TopKRouter(DIM, 5, 2, renormalise="before_drop"), lambda: GroupedGLU(5, DIM, 20), None,
    ),
    "two-layer, one choice, drops": (
        lambda: TopKRouter(DIM, 5, 1, capacity=Capacity(1.0, 1.0, minimum=1), exploration=InputJitter(0.1)),
        lambda: GroupedMLP(5, DIM, 20), None,
    ),
    "biases, three choices": (
        lambda: TopKRouter(DIM, 5, 3), lambda: GroupedMLP(5, DIM, 20, bias=True, activation="gelu"), None,
    ),
    "drops shared out, under autocast": (
        lambda: TopKRouter(DIM, 5, 2, capacity=Capacity(1.0, 1.0, minimum=1), renormalise="after_drop"),
        lambda: GroupedGLU(5, DIM, 20, activation="silu"), torch.bfloat16,
    ),
}  # fmt: skip


@case(*[(name,) for name in LAYERS])
def layer(name: str) -> None:
    """A MoELayer by Triton is the one by torch: output, list, losses, statistics, gradients of all parameters."""
    make_router, make_bank, cast = LAYERS[name]
    made = MoELayer(make_router(), make_bank())
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, mask = torch.randn(2, 7, DIM), torch.ones(2, 7, dtype=torch.bool)
    if "biases" not in name:
        mask[1, 4:] = False
    results = []
    for backend in ("triton", "torch"):
        use_backend(made, backend)  # type: ignore[arg-type]
        torch.manual_seed(1)
        rows_in = x.clone().requires_grad_()
        started = len(STARTED)
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            hidden, routing = made(rows_in, None if mask.all() else RoutingContext(mask=mask))
        loss = hidden.float().square().sum() + routing.losses["load_balance"] + routing.losses["router_z"]
        grads = torch.autograd.grad(loss, [rows_in, *made.parameters()])
        assert (len(STARTED) > started) == (backend == "triton"), f"{backend} started {STARTED[started:]}"
        where = routing.queued
        listed = [getattr(routing, f)[where] for f in ("token", "expert", "weight", "position", "kept")]
        results.append([hidden, *listed, *routing.losses.values(), *routing.statistics.values(), *grads])
        assert hidden.dtype == x.dtype
    for number, (fast, slow) in enumerate(zip(*results, strict=True)):
        same(fast.detach(), slow.detach(), f"result {number}", 2e-2 if cast else 5e-6)


@case()
def hooks_of_a_bank_are_called() -> None:
    """A bank that somebody watches computes by itself, whatever kind of hook it is."""
    ways = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")
    for way in ways:
        made, called = MoELayer(TopKRouter(DIM, 3, 1), GroupedMLP(3, DIM, 20), backend="triton"), []
        getattr(made.experts, f"register_{way}")(lambda *_, called=called: called.append(1) or None)
        made(torch.randn(4, DIM, requires_grad=True)).hidden.sum().backward()
        assert called, way
    made = MoELayer(TopKRouter(DIM, 3, 1), GroupedMLP(3, DIM, 20), backend="triton")
    made.experts.forward = lambda rows, counts=None: torch.full_like(rows, 2.0)
    found = made(torch.randn(4, DIM))
    weight = found.routing.weight.detach()[:, None]
    same(found.hidden.detach(), 2.0 * weight.expand(4, DIM), "a forward of its own", 1e-6)


@case()
def auto_never_takes_the_cpu() -> None:
    x = torch.randn(3, DIM)
    assert choose("auto", x, "layer") == ("torch", "the tensors are on cpu")
    started = len(STARTED)
    MoELayer(TopKRouter(DIM, 4, 2), GroupedGLU(4, DIM, 20))(x)
    assert len(STARTED) == started


@case((torch.float32,), (torch.bfloat16,))
def proof_of_kernels_that_are_right(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert proof._failure.__wrapped__(torch.device("cpu"), dtype) == ""


@case()
def proof_of_kernels_that_are_wrong() -> None:
    right = feed_forward.matrix_grad
    wrongs: dict[str, Callable[..., Tensor]] = {
        "of the result": lambda *a, **o: right(*a, **o) * 1.1,
        "inf of the result": lambda *a, **o: torch.full_like(right(*a, **o), math.nan),
        "RuntimeError: no kernel image": lambda *a, **o: (_ for _ in ()).throw(RuntimeError("no kernel image")),
    }
    for said, wrong in wrongs.items():
        feed_forward.matrix_grad = wrong
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = proof._failure.__wrapped__(torch.device("cpu"), torch.float32)
        finally:
            feed_forward.matrix_grad = right
        assert said in found, found
        assert "Triton kernels are not used for torch.float32 on cpu" in str(caught[-1].message)


STARTED: list[str] = []


def main() -> int:
    """Run the cases that are named, or all."""
    assert is_interpreted(), "set TRITON_INTERPRET=1"
    torch.set_num_threads(1)
    poison()
    for module in (hidden, products):
        module.tiles_for = lambda *_: tiles.Tiles(16, 64, 16, 4, 2)  # few programs: each is slow
    proof._TOKENS, proof._DIM, proof._HIDDEN = 9, 12, 20
    for module in (hidden, products, rows, router):
        launch = module.launch

        def noted(kernel: Any, *arguments: Any, launch: Any = launch, **options: Any) -> None:
            STARTED.append(kernel.__name__)
            launch(kernel, *arguments, **options)

        module.launch = noted
    results, seconds = {}, {}
    for name, run in CASES.items():
        if len(sys.argv) > 1 and not any(wanted in name for wanted in sys.argv[1:]):
            continue
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            run()
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        seconds[name] = round(time.perf_counter() - begun, 2)
    print(json.dumps({"results": results, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
