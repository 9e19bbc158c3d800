"""Rows travel while the shared branch is computed, forward and backward: the same results, and the order of a trace."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moekit import MoELayer
from moekit.dispatch import AllToAll, Dispatcher, Exchange, PackedDispatcher, PaddedDispatcher, TwoLevelAllToAll
from moekit.experts import GroupedMLP
from moekit.mixing import Mix, SoftmaxMix
from moekit.routers import gshard, switch
from moekit.testing import assert_close, run_distributed, seeded
from moekit.transformer import MLP

E, D = 4, 6
HIDDEN, SHARED = 41, 43  # nobody else's sizes: they say whose product it is

Call = Callable[[MoELayer, Tensor], Tensor]


def plainly(layer: MoELayer, x: Tensor) -> Tensor:
    return layer(x).hidden


def kept(layer: MoELayer, x: Tensor, reentrant: bool) -> Tensor:
    out: Tensor = checkpoint(functools.partial(plainly, layer), x, use_reentrant=reentrant)
    return out


def compiled(layer: MoELayer, x: Tensor) -> Tensor:
    out: Tensor = torch.compile(plainly, backend="aot_eager")(layer, x)
    return out


CALLS: dict[str, Call] = {
    "plain": plainly,
    "checkpointed": functools.partial(kept, reentrant=False),
    "checkpointed, reentrant": functools.partial(kept, reentrant=True),
    "compiled": compiled,
    "anomaly detection": plainly,  # in the backward: see `gradients`
}


def layer_of(k: int, dispatcher: Dispatcher, shared: bool, mix: bool) -> MoELayer:
    with seeded(0):
        router = (switch if k == 1 else gshard)(D, E, capacity_factor=2.0, eval_capacity_factor=4.0)
        branch: nn.Module | None = MLP(D, SHARED, dropout=0.5) if shared else None
        joined: Mix | None = SoftmaxMix(D) if mix else None
        return MoELayer(router, GroupedMLP(E, D, HIDDEN, activation="silu"), dispatcher, branch, mix=joined)


def divided(whole: MoELayer, exchange: Exchange) -> MoELayer:
    """This rank's share of a layer."""
    layer = copy.deepcopy(whole)
    here, rank = E // exchange.size, dist.get_rank()
    layer.experts = GroupedMLP(here, D, HIDDEN, activation="silu")
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            parameter.copy_(whole.experts.get_parameter(name)[rank * here : (rank + 1) * here])
    layer.connect(exchange)
    return layer


def tokens(rank: int) -> Tensor:
    return torch.randn(5 + 3 * rank, D, generator=torch.Generator().manual_seed(rank))


def gradients(layer: MoELayer, name: str) -> dict[str, Tensor]:
    """The output of a step, and the gradients of tokens and parameters."""
    x = tokens(dist.get_rank()).requires_grad_()
    layer.zero_grad()
    torch.manual_seed(7)  # of noise and dropout
    out = CALLS[name](layer, x)
    with torch.autograd.set_detect_anomaly(name == "anomaly detection"):
        (out * torch.arange(out.numel()).cos().view_as(out)).sum().backward()
    assert x.grad is not None
    found = {"output": out.detach(), "tokens": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def second_derivative(layer: MoELayer) -> Tensor:
    x = tokens(dist.get_rank()).requires_grad_()
    torch.manual_seed(7)
    (first,) = torch.autograd.grad(plainly(layer, x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return second


class Order(TorchDispatchMode):
    """The order of issues (i) and waits (w) of rows, of the shared branch's products (S) and the experts' (E)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "all_to_all_single" in name and args[0].dim() > 1 and args[0].shape[-1] == D:
            self.seen += "i"
        elif "wait_tensor" in name and args[0].shape[-1] == D:
            self.seen += "w"
        elif "mm" in name and any(isinstance(arg, Tensor) and SHARED in arg.shape for arg in args):
            self.seen += "S"
        elif "mm" in name and any(isinstance(arg, Tensor) and HIDDEN in arg.shape for arg in args):
            self.seen += "E"
        return func(*args, **(kwargs or {}))


def order(layer: MoELayer, *, tracked: bool = True) -> tuple[str, str]:
    """Of a forward and a backward."""
    x = tokens(dist.get_rank()).requires_grad_(tracked)
    with Order() as forward:
        out = plainly(layer, x)
    with Order() as backward:
        out.sum().backward()
    return squeezed(forward.seen), squeezed(backward.seen)


def squeezed(seen: str) -> str:
    """Without repetitions of products."""
    return "".join(letter for n, letter in enumerate(seen) if letter in "iw" or n == 0 or seen[n - 1] != letter)


def overlapped_equals_waiting() -> None:
    """Bit for bit, and to rounding the layer of one process."""
    rank = dist.get_rank()
    alone = [dist.new_group([n]) for n in range(2)][rank]
    world = dist.group.WORLD
    kinds: dict[str, tuple[int, Dispatcher]] = {
        "packed": (1, PackedDispatcher()),
        "once per rank": (2, PackedDispatcher()),
        "padded": (2, PaddedDispatcher()),
    }
    for kind, (k, dispatcher) in kinds.items():
        for shared, mix in ((False, False), (True, False), (True, True)):
            whole = layer_of(k, dispatcher, shared, mix)
            for name in CALLS:
                if name != "plain" and (not shared or mix or (name == "compiled" and kind != "packed")):
                    continue
                what = f"{kind}, shared {shared}, mix {mix}, {name}"
                exchanges = [
                    lambda overlap: AllToAll(world, overlap=overlap),
                    lambda overlap: TwoLevelAllToAll(alone, world, overlap=overlap),
                ]
                for exchange in exchanges[: 2 if name == "plain" else 1]:
                    fast, slow = (gradients(divided(whole, exchange(overlap)), name) for overlap in (True, False))
                    assert fast.keys() == slow.keys(), what
                    for part in fast:
                        assert torch.equal(fast[part], slow[part]), f"{what}: {part}"
            one, many = whole.eval(), divided(whole, AllToAll(world)).eval()
            x = tokens(rank)
            assert_close(many(x).hidden, one(x).hidden, f"{kind}, one process")
            if shared:
                fast_second, slow_second = (
                    second_derivative(divided(whole, AllToAll(world, overlap=overlap))) for overlap in (True, False)
                )
                assert torch.equal(fast_second, slow_second), f"{kind}: second derivative"


def issue_and_wait() -> None:
    """The shared branch stands between the issue and the wait of the rows and of their gradients, and only there."""
    for k, dispatcher in ((1, PackedDispatcher()), (2, PackedDispatcher()), (2, PaddedDispatcher())):
        whole = layer_of(k, dispatcher, True, False)
        overlapped = divided(whole, AllToAll(dist.group.WORLD))
        assert order(overlapped) == ("iSwEiw", "iwEiSw"), dispatcher
        waiting = divided(whole, AllToAll(dist.group.WORLD, overlap=False))
        assert order(waiting) == ("iwSEiw", "iwESiw"), dispatcher
        # Rows that nobody differentiates come at once.
        overlapped.router.requires_grad_(False)
        assert order(overlapped, tracked=False) == ("iwSEiw", "iwES"), dispatcher
        overlapped.shared = None
        overlapped.router.requires_grad_(True)
        assert order(overlapped) == ("iwEiw", "iwEiw"), dispatcher


class Fails(nn.Module):
    """A shared branch that cannot be computed."""

    dim = D

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the branch is at fault")


def a_failing_branch_leaves_no_message() -> None:
    """Its error is told, the rows that are on their way are waited for, and the layer goes on as before."""
    rank, world = dist.get_rank(), dist.group.WORLD
    alone = [dist.new_group([n]) for n in range(2)][rank]
    for k, dispatcher in ((1, PackedDispatcher()), (2, PackedDispatcher()), (2, PaddedDispatcher())):
        for exchange in (AllToAll(world), TwoLevelAllToAll(alone, world)):
            layer = divided(layer_of(k, dispatcher, True, False), exchange).eval()
            x = tokens(rank)
            expected, branch = plainly(layer, x), layer.shared
            layer.shared = Fails()
            for tracked in (True, False):
                with torch.set_grad_enabled(tracked), pytest.raises(ValueError, match="branch is at fault"):
                    plainly(layer, x.clone().requires_grad_(tracked))
                assert torch._C._distributed_c10d._get_work_registry_size() == 0, (dispatcher, tracked)
            layer.shared = branch
            assert torch.equal(plainly(layer, x), expected)


def both() -> None:
    torch._logging.set_logs(dynamo=logging.ERROR)  # of graph breaks where sizes are read
    overlapped_equals_waiting()
    issue_and_wait()
    a_failing_branch_leaves_no_message()


def test_overlap() -> None:
    run_distributed(both, 2)
