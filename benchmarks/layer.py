"""A sparse feed-forward layer, forward and backward, beside one dense feed-forward of the same active work.

The dense feed-forward (hidden size k F) is the floor. "products alone" are the six products of each expert under a
random router's loads, one expert after the other and written over the last ones: what they take if nothing else does.
moekit's layers have their router, its noise, losses and statistics; what the others leave out is said where they are
defined. All take turns in one process. Where an arm's output differs from that of a loop over experts with its weights,
nothing is reported.

    python benchmarks/layer.py                                  # 8, 32 and 128 experts, top-1 and top-2; 256 x 512
    python benchmarks/layer.py --case 4096x32x1 --rounds 20     # tokens x experts x choices
    python benchmarks/layer.py --quick                          # toy sizes: does it run?
    python benchmarks/layer.py --no-keep-memory                 # as the C library would have it

Peers are transformers' SwitchTransformers (top-1) and Mixtral, whose experts are gated and therefore of hidden size
2 F / 3, and DeepSpeed where it is installed: pip install -e ".[bench]".
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Step, compared, counted, interleaved, peak_bytes, refuse, write_json, written
from torch import Tensor, nn

from moekit import AuxLosses, MoELayer
from moekit.dispatch import Dispatcher, PackedDispatcher, PaddedDispatcher
from moekit.experts import GroupedMLP
from moekit.performance import keep_memory
from moekit.planner.measure import product_rate
from moekit.routers import gshard, switch

CASES = ((4096, 8, 1), (4096, 8, 2), (4096, 32, 1), (4096, 32, 2), (4096, 128, 1), (256, 512, 1))
FLOOR = "dense"
_PADDED = {1: 1.25, 2: 1.0}  # capacity factors of Switch and GShard


class Dense(nn.Module):
    """The floor: relu(x W_in) W_out."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.w_out(F.relu(self.w_in(x))), x.new_zeros(())


class Ours(nn.Module):
    """A `MoELayer` with its objective."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int, factor: float | None, how: Dispatcher | None):
        super().__init__()
        evaluation = None if factor is None else float(experts)  # room for all
        router = (switch if k == 1 else gshard)(dim, experts, capacity_factor=factor, eval_capacity_factor=evaluation)
        self.layer = MoELayer(router, GroupedMLP(experts, dim, hidden), how)
        self.losses = AuxLosses(load_balance=1e-2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routing = self.layer(x)
        return hidden, self.losses(routing)[0]

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.layer.experts.reference(e, x)  # type: ignore[no-any-return, operator]


class Products(nn.Module):
    """The products of a sparse layer and nothing else: rows stand sorted, results are written over the last ones.

    Without activation, and without autograd for the weights, whose gradients are computed all the same.
    """

    def __init__(self, hidden: int, experts: int, k: int, x: Tensor) -> None:
        super().__init__()
        dim = x.shape[1]
        chosen = (x @ torch.randn(dim, experts)).topk(k, dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
        rows = x.repeat(k, 1)
        w_in, w_out = torch.randn(experts, dim, hidden) * dim**-0.5, torch.randn(experts, hidden, dim) * hidden**-0.5
        wide = torch.empty(len(rows), hidden)
        grad = rows / len(x)
        self.forwards: list[tuple[Tensor, Tensor, Tensor]] = []
        self.backwards: list[tuple[Tensor, Tensor, Tensor]] = []
        self.out, d_wide, d_rows = torch.empty_like(rows), torch.empty_like(wide), torch.empty_like(rows)
        blocks = (tensor.split(counts) for tensor in (rows, wide, self.out, grad, d_wide, d_rows))
        matrices = (w.unbind(0) for w in (w_in, w_out, torch.empty_like(w_in), torch.empty_like(w_out)))
        for r, h, o, g, dh, dr, v, w, dv, dw in zip(*blocks, *matrices, strict=True):
            if len(r):
                self.forwards += [(r, v, h), (h, w, o)]
                self.backwards += [(g, w.t(), dh), (h.t(), g, dw), (dh, v.t(), dr), (r.t(), dh, dv)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = _ProductsAlone.apply(x, self)
        return out, x.new_zeros(())


class _ProductsAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Products) -> Tensor:
        ctx.products = products
        for left, right, into in products.forwards:
            torch.mm(left, right, out=into)
        return products.out[: len(x)].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        for left, right, into in ctx.products.backwards:
            torch.mm(left, right, out=into)
        return grads[0], None


class Plain(nn.Module):
    """What one writes by hand: choose, sort, compute, add; losses and noise are left out.

    ``grouped`` multiplies with `torch.nn.functional.grouped_mm`, otherwise each expert has parameters of its own.
    """

    def __init__(self, dim: int, hidden: int, experts: int, k: int, grouped: bool) -> None:
        super().__init__()
        self.k, self.num_experts = k, experts
        self.router = nn.Linear(dim, experts, bias=False)
        w_in, w_out = torch.randn(experts, dim, hidden) * dim**-0.5, torch.randn(experts, hidden, dim) * hidden**-0.5
        if grouped:
            self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)
        else:
            self.first = nn.ParameterList(w_in.unbind(0))
            self.second = nn.ParameterList(w_out.unbind(0))
        self.grouped = grouped

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, expert = self.router(x).softmax(-1).topk(self.k, dim=-1)
        if self.k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort(stable=True)
        counts = torch.bincount(expert.flatten(), minlength=self.num_experts)
        token = order // self.k
        rows = x.index_select(0, token)
        if self.grouped:
            ends = counts.cumsum(0).to(torch.int32)
            out = F.grouped_mm(F.relu(F.grouped_mm(rows, self.w_in, offs=ends)), self.w_out, offs=ends)
        else:
            blocks = rows.split(counts.tolist())
            out = torch.cat(
                [F.relu(b @ v) @ w for b, v, w in zip(blocks, self.first, self.second, strict=True) if len(b)]
            )
        out = out * weight.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, out), x.new_zeros(())

    def expert(self, e: int, x: Tensor) -> Tensor:
        v, w = (self.w_in[e], self.w_out[e]) if self.grouped else (self.first[e], self.second[e])
        return F.relu(x @ v) @ w


class Switch(nn.Module):
    """transformers' SwitchTransformers, without its losses, with room for all."""

    def __init__(self, dim: int, hidden: int, experts: int, tokens: int) -> None:
        super().__init__()
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

        self.layer = SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                d_model=dim, d_ff=hidden, num_experts=experts, expert_capacity=tokens, dropout_rate=0.0
            )
        )
        self.router = self.layer.router.classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x[None].clone())[0], x.new_zeros(())  # its noise is written into its input

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.layer.experts[f"expert_{e}"](x)  # type: ignore[no-any-return]


class Mixtral(nn.Module):
    """transformers' Mixtral with grouped products, without its losses; gated experts of hidden size 2 F / 3."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=dim,
            intermediate_size=hidden * 2 // 3 // 8 * 8,
            num_local_experts=experts,
            num_experts_per_tok=k,
            hidden_act="relu",
            experts_implementation="grouped_mm",
        )
        self.layer = MixtralSparseMoeBlock(config)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, std=dim**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x[None])[0], x.new_zeros(())

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.layer.experts.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.relu(gate) * up, self.layer.experts.down_proj[e])


class DeepSpeed(nn.Module):
    """DeepSpeed's MoE of one process, its balance loss included."""

    def __init__(self, dim: int, hidden: int, experts: int, k: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        one = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False))
        self.layer = MoE(dim, one, experts, k=k, capacity_factor=_PADDED[k])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, loss, _ = self.layer(x[None])
        return hidden[0], 1e-2 * loss


def arms_of(hidden: int, experts: int, k: int, x: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """How each arm is built, by name."""
    tokens, dim = x.shape
    found: dict[str, Callable[[], nn.Module]] = {
        FLOOR: lambda: Dense(dim, k * hidden),
        "products alone": lambda: Products(hidden, experts, k, x),
        "moekit packed": lambda: Ours(dim, hidden, experts, k, None, PackedDispatcher()),
        "moekit capacity": lambda: Ours(dim, hidden, experts, k, _PADDED[k], None),
        "moekit padded": lambda: Ours(dim, hidden, experts, k, _PADDED[k], PaddedDispatcher()),
        "sort + grouped_mm": lambda: Plain(dim, hidden, experts, k, True),
        "separate parameters": lambda: Plain(dim, hidden, experts, k, False),
    }
    if importlib.util.find_spec("transformers") is not None:
        if k == 1:
            found["transformers Switch"] = lambda: Switch(dim, hidden, experts, tokens)
        found["transformers Mixtral"] = lambda: Mixtral(dim, hidden, experts, k)
    if importlib.util.find_spec("deepspeed") is not None:
        found["deepspeed"] = lambda: DeepSpeed(dim, hidden, experts, k)
    return found


@torch.no_grad()
def check(name: str, arm: nn.Module, x: Tensor, k: int) -> None:
    """Refuse if the arm's output is not that of a loop over experts, in evaluation: without noise and without drops."""
    if not hasattr(arm, "expert"):
        return
    arm.eval()
    got = arm(x)[0]
    if isinstance(arm, Ours):
        routing = arm.layer.router(x)
        weight = routing.weight.view(k, -1).t()
        expert = routing.expert.view(k, -1).t()
    else:
        matrix = arm.layer.gate.weight if isinstance(arm, Mixtral) else arm.router.weight
        weight, expert = F.linear(x, matrix).softmax(-1).topk(k, dim=-1)
        weight = weight if k == 1 and not isinstance(arm, Mixtral) else weight / weight.sum(-1, keepdim=True)
    wanted = torch.zeros_like(x)
    for choice in range(k):
        for e in expert[:, choice].unique().tolist():
            here = (expert[:, choice] == e).nonzero().squeeze(1)
            wanted[here] += weight[here, choice, None] * arm.expert(e, x[here])
    if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        refuse(f"{name} differs from a loop over its experts by up to {float((got - wanted).abs().max()):.3g}")
    arm.train()


def stepper(arm: nn.Module, x: Tensor, grad: Tensor) -> Step:
    """Forward and backward, to the parameters and to the input, then the gradients are dropped as an optimizer does."""
    parameters = list(arm.parameters())

    def step() -> None:
        rows = x.detach().requires_grad_()
        hidden, loss = arm(rows)
        torch.autograd.backward((hidden, loss), (grad, torch.ones_like(loss))) if loss.requires_grad else (
            hidden.backward(grad)
        )
        for parameter in parameters:
            parameter.grad = None

    return step


def measure(case: tuple[int, int, int], dim: int, hidden: int, options: argparse.Namespace) -> dict[str, Any]:
    """All arms of a case."""
    tokens, experts, k = case
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, dim), torch.randn(tokens, dim) / tokens
    steps, peaks = {}, {}
    for name, build in arms_of(hidden, experts, k, x).items():
        if options.arms and name != FLOOR and not any(part in name for part in options.arms):
            continue
        arm = build().train()
        check(name, arm, x[:256], k)
        steps[name] = stepper(arm, x, grad)
        steps[name]()
        if not options.no_memory:
            peaks[name] = peak_bytes(steps[name])
    found = compared(interleaved(steps, options.rounds), FLOOR)
    work = 3 * 2 * 2.0 * tokens * dim * k * hidden  # operations of the products, forward and twice that backward
    rate = product_rate("cpu", torch.float32)
    for name, row in found.items():
        row["peak_bytes"] = peaks.get(name, 0)
        row["tflops"] = work / row["wall"]["median_seconds"] / 1e12
        row["share_of_product_rate"] = work / row["wall"]["median_seconds"] / rate
    return {"tokens": tokens, "experts": experts, "k": k, "dim": dim, "hidden": hidden, "arms": found}


def table(result: dict[str, Any]) -> str:
    """One case as text."""
    lines = [
        f"{result['tokens']} tokens, {result['experts']} experts, top-{result['k']}, dim {result['dim']}, "
        f"hidden {result['hidden']}: over {FLOOR}, forward and backward",
        "",
        "| arm | processor, median | of minima | wall, median | of minima | TFLOP/s | of product rate | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["arms"].items():
        cpu, wall = row["processor"], row["wall"]
        lines.append(
            f"| {name} | {cpu['median_ratio']:.2f} | {cpu['ratio_of_least']:.2f} | {wall['median_ratio']:.2f} | "
            f"{wall['ratio_of_least']:.2f} | {row['tflops']:.4f} | {row['share_of_product_rate']:.0%} | "
            f"{row['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def case(text: str) -> tuple[int, int, int]:
    """Tokens x experts x choices."""
    tokens, experts, k = (int(part) for part in text.split("x"))
    return tokens, experts, k


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=case, nargs="+", default=CASES, metavar="TxExK")
    parser.add_argument("--arms", nargs="+", help="only arms whose names contain one of these, and the floor")
    parser.add_argument("--rounds", type=counted, default=12, help="counted rounds (default 12)")
    parser.add_argument("--threads", type=counted, default=1)
    parser.add_argument("--no-keep-memory", action="store_true", help="leave the C library as it is")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--quick", action="store_true", help="toy sizes and two rounds: whether it runs")
    parser.add_argument("--json", type=written, metavar="FILE", help="write what was measured and on what")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    kept = False if options.no_keep_memory else keep_memory()
    results = []
    cases = ((64, 4, 1), (64, 4, 2), (16, 32, 1)) if options.quick else options.case
    if options.quick:
        options.rounds = 2
    for one in cases:
        few = one[0] <= 512
        dim, hidden = (16, 48) if options.quick else (128, 256) if few else (512, 2048)
        results.append(measure(one, dim, hidden, options))
        print(table(results[-1]) + "\n", flush=True)
    write_json(options.json, {"threads": options.threads, "keeps_memory": kept, "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
