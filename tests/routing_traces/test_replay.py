"""A trace that is played again gives the run that it was recorded in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moekit as mk
from moekit.errors import UserError
from moekit.mechanisms import expert_gradients
from moekit.parallel import Layout, build_meshes, parallelize
from moekit.routers import (
    GatingResidual,
    InputJitter,
    NoTokenLeftBehind,
    SampledChoice,
    TaskTableRouter,
    TopKRouter,
    UniformRouter,
    deepseek_v3,
)
from moekit.routing import Capacity, Router, Routing, RoutingContext
from moekit.routing_traces import ReplayRouter, RoutingTrace, join_rollout, read_trace, record, replay
from moekit.testing import random_routing, run_distributed

D, E, STEPS, TOKENS = 8, 4, 3, 32
TIGHT = Capacity(train=0.7, priority="random")


def top_two() -> Router:
    """Everything that draws: jitter, a sampled second expert, random token selection."""
    return TopKRouter(
        D, E, 2, capacity=TIGHT, exploration=InputJitter(0.1), second_expert=SampledChoice(), renormalise="after_drop",
        init_scale=1.0,
    )  # fmt: skip


def none_left_behind() -> Router:
    return TopKRouter(D, E, 2, capacity=TIGHT, overflow=NoTokenLeftBehind(), init_scale=1.0)


ROUTERS: dict[str, Callable[[], Router]] = {
    "top two": top_two,
    "overflow": none_left_behind,
    "switch": lambda: mk.routers.switch(D, E, capacity_factor=0.8),
    "deepseek": lambda: deepseek_v3(D, E, k=2, balance=None),
}


class Net(nn.Module):
    """Two sparse layers with dropout between."""

    def __init__(self, router: Callable[[], Router] = top_two, *, recomputed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(mk.MoELayer(router(), mk.experts.GroupedMLP(E, D, 16)) for _ in range(2))
        self.dropout, self.recomputed = nn.Dropout(0.1), recomputed

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        routings = []
        for layer in self.layers:
            hidden, routing = checkpoint(layer, x, use_reentrant=False) if self.recomputed else layer(x)
            x = x + self.dropout(hidden)
            routings.append(routing)
        return x, routings


def batch(step: int, part: int = 0) -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(10 * step + part))


def trained(net: Net, *, parts: int = 1, listen: bool = True) -> list[float]:
    """Losses of some steps; with several parts all forwards of a step come before its backward."""
    if listen:
        mk.listen(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    torch.manual_seed(2)
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for part in range(parts):
            x = batch(step, part)
            y, routings = net(x)
            total = total + (y - x.roll(1, -1)).square().mean()
            if "load_balance" in routings[0].losses:
                total = total + mk.AuxLosses(load_balance=0.1)(*routings)[0]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        mk.step_end(net)
        losses.append(float(total.detach()))
    return losses


def recorded(folder: Path, net: Net, **options: Any) -> tuple[list[float], RoutingTrace]:
    with record(net, folder / "t.npz"):
        losses = trained(net, **options)
    return losses, read_trace(folder / "t.npz")


@pytest.mark.parametrize("name", ROUTERS)
def test_the_losses_are_the_same_to_the_last_digit(name: str, tmp_path: Path) -> None:
    """Under tight capacity, with everything random: same seed, same run. Routers learn in both."""
    first = Net(ROUTERS[name])
    losses, trace = recorded(tmp_path, first)
    again = Net(ROUTERS[name])
    with replay(again, trace) as playing:
        assert playing.left == STEPS
        assert trained(again) == losses
        assert playing.left == 0
    for (parameter, one), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), parameter
    assert "forward" not in again.layers[0].router.__dict__


def test_the_choice_is_played_whatever_the_router_says(tmp_path: Path) -> None:
    """Other weights of the router: the recorded experts, its own scores, and a gradient for them."""
    net = Net(lambda: TopKRouter(D, E, 2, capacity=TIGHT, renormalise="before_drop"))
    with record(net, tmp_path / "t.npz"):
        net(batch(0))
    trace = read_trace(tmp_path / "t.npz")
    then = trace[0].layers["layers.0"].routing
    router = net.layers[0].router
    nn.init.normal_(router.weight, std=2.0)
    with replay(net, trace):
        y, (now, _) = net(batch(0))
    for name in ("token", "expert", "position", "kept"):
        assert torch.equal(getattr(now, name), getattr(then, name))
    assert not torch.equal(router(batch(0)).expert, then.expert)
    # Slowly: softmax over all, then the two of each token that were recorded.
    probs = (batch(0) @ router.weight.detach().t()).softmax(-1)
    for place, (token, expert) in enumerate(zip(now.token.tolist(), now.expert.tolist(), strict=True)):
        both = [int(e) for t, e in zip(now.token, now.expert, strict=True) if int(t) == token]
        expected = float(probs[token, expert] / probs[token, both].sum())
        assert float(now.weight.detach()[place]) == pytest.approx(expected, abs=1e-6)
    first = torch.bincount(now.expert[:TOKENS], minlength=E) / TOKENS  # of the played choice, not of the router's own
    balance = E * float((first * probs.mean(0)).sum())
    assert float(now.losses["load_balance"].detach()) == pytest.approx(balance, abs=1e-5)
    y.sum().backward()
    assert router.weight.grad is not None
    assert bool(router.weight.grad.abs().sum() > 0)


def test_recorded_weights_have_no_gradient(tmp_path: Path) -> None:
    net = Net()
    net.eval()
    with record(net, tmp_path / "t.npz"):
        expected, routings = net(batch(0))
    for layer in net.layers:
        nn.init.normal_(layer.router.weight)
    with replay(net, read_trace(tmp_path / "t.npz"), weights="recorded"):
        got, played = net(batch(0))
    assert torch.equal(got, expected)
    assert torch.equal(played[0].losses["load_balance"], routings[0].losses["load_balance"].detach())
    assert not played[0].weight.requires_grad
    got.sum().backward()
    assert net.layers[0].router.weight.grad is None


def test_what_the_router_drew_is_drawn(tmp_path: Path) -> None:
    """By recorded weights too, so that dropout behind it is the same."""

    def outputs(net: Net) -> list[Tensor]:
        torch.manual_seed(2)
        with torch.no_grad():
            return [net(batch(step))[0] for step in range(STEPS)]

    net = Net()
    with record(net, tmp_path / "t.npz"):
        expected = outputs(net)
    with replay(net, read_trace(tmp_path / "t.npz"), weights="recorded"):
        got = outputs(net)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_computed_again_in_backward_is_played_again(parts: int, tmp_path: Path) -> None:
    """Activation checkpointing runs forward twice, also of several forwards before one backward, and from the last."""
    losses, trace = recorded(tmp_path, Net(recomputed=True), parts=parts)
    assert len(trace) == STEPS * parts
    again = Net(recomputed=True)
    with replay(again, trace) as playing:
        assert trained(again, parts=parts) == losses
        assert playing.left == 0


@pytest.mark.parametrize(("training", "reentrant"), [(False, False), (True, True)])
def test_a_forward_without_gradient_or_training_is_played_again_too(
    training: bool, reentrant: bool, tmp_path: Path
) -> None:
    """A policy that learns in evaluation mode, and checkpointing whose forward has no gradient."""
    layer = mk.MoELayer(TopKRouter(D, E, 2), mk.experts.GroupedMLP(E, D, 8)).train(training)

    def gradient() -> Tensor | None:
        layer.zero_grad()
        x = batch(0).requires_grad_()
        checkpoint(lambda x: layer(x).hidden, x, use_reentrant=reentrant).sum().backward()
        return layer.router.weight.grad

    with record(layer, tmp_path / "t.npz"):
        expected = gradient()
    with replay(layer, read_trace(tmp_path / "t.npz")) as playing:
        got = gradient()
    assert playing.left == 0
    assert expected is not None
    assert got is not None
    assert torch.equal(got, expected)


def test_equal_micro_batches_are_played_again_each_as_it_was(tmp_path: Path) -> None:
    """Their routing differs by what was drawn."""
    layer = mk.MoELayer(TopKRouter(D, E, 2, exploration=InputJitter(0.5)), mk.experts.GroupedMLP(E, D, 8))

    def gradients() -> list[Tensor | None]:
        torch.manual_seed(2)
        layer.zero_grad()
        total = torch.zeros(())
        for factor in (1, 2):
            x = batch(0).requires_grad_()
            total = total + factor * checkpoint(lambda x: layer(x).hidden, x, use_reentrant=False).square().sum()
        total.backward()
        return [parameter.grad for parameter in layer.parameters()]

    with record(layer, tmp_path / "t.npz"):
        expected = gradients()
    trace = read_trace(tmp_path / "t.npz")
    assert not torch.equal(*(one.layers["layer"].routing.expert for one in trace))
    with replay(layer, trace):
        for got, wanted in zip(gradients(), expected, strict=True):
            assert got is not None
            assert wanted is not None
            assert torch.equal(got, wanted)


def test_a_copy_of_the_model_plays_nothing(tmp_path: Path) -> None:
    """And a model that is written as a whole meanwhile plays nothing where it is read."""
    net = Net().eval()
    with record(net, tmp_path / "t.npz"):
        expected, _ = net(batch(0))
    with replay(net, read_trace(tmp_path / "t.npz")) as playing:
        other = copy.deepcopy(net)
        assert torch.equal(other(batch(0))[0], expected)
        assert playing.left == 1
        torch.save(net, tmp_path / "net.pt")
    assert torch.equal(other(batch(0))[0], expected)
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(batch(0))[0], expected)


def test_processes_that_generated_are_one_rollout(tmp_path: Path) -> None:
    layer = mk.MoELayer(TopKRouter(D, E, 2, capacity=Capacity(eval=0.6)), mk.experts.GroupedMLP(E, D, 8)).eval()
    written, expected = torch.randn(4, 7, D), []
    for rank, rows in enumerate(written.chunk(2)):
        file = tmp_path / f"0.rank{rank}.npz"
        with record(layer, file, notes={"processes": "2", "of": "a test"}), torch.no_grad():
            expected.append(torch.cat([layer(part).hidden for part in rows.split([5, 1, 1], 1)], 1))
    trace = join_rollout(read_trace(tmp_path), tmp_path / "whole.npz", rows=4)
    assert trace.notes == {"of": "a test"}
    with replay(layer, trace):
        torch.testing.assert_close(layer(written).hidden, torch.cat(expected))
    with pytest.raises(UserError, match="one or more rows: got 0"):
        join_rollout(trace, tmp_path / "whole.npz", rows=0)


def test_any_router_plays_by_recorded_weights(tmp_path: Path) -> None:
    """A router without scores, one with a residual, and one alone that has nobody beside it."""
    net = Net(lambda: UniformRouter(E, 2, order="random", capacity=TIGHT))
    with record(net, tmp_path / "t.npz"):
        expected, _ = net(batch(0))
    trace = read_trace(tmp_path / "t.npz")
    bare = Net()
    bare.load_state_dict(net.state_dict(), strict=False)
    bare.dropout = nn.Identity()  # type: ignore[assignment]
    for name, layer in zip(trace.layers, bare.layers, strict=True):
        layer.router = ReplayRouter(trace, name, weights="recorded")
    net.dropout = nn.Identity()  # type: ignore[assignment]
    with replay(net, trace, weights="recorded"):
        assert torch.equal(net(batch(0))[0], bare(batch(0))[0])
    assert expected.shape == (TOKENS, D)
    router = TopKRouter(D, E, residual=GatingResidual(E, E))
    moe = mk.MoELayer(router, mk.experts.GroupedMLP(E, D, 8))
    context = RoutingContext(previous_logits=torch.randn(TOKENS, E))
    with record(moe, tmp_path / "r.npz"):
        hidden = moe(batch(0), context).hidden
    residual = read_trace(tmp_path / "r.npz")
    with replay(moe, residual, weights="recorded"):
        played = moe(batch(0), context)
    assert torch.equal(played.hidden, hidden)
    assert played.routing.logits is not None


def test_a_replay_router_stands_in_a_layer(tmp_path: Path) -> None:
    """With a router inside, whose state moves as it did."""
    losses, trace = recorded(tmp_path, Net(ROUTERS["deepseek"]))
    again = Net(ROUTERS["deepseek"])
    for name, layer in zip(trace.layers, again.layers, strict=True):
        layer.router = ReplayRouter(trace, name, layer.router)
    assert trained(again) == losses
    assert again.layers[0].router.left == 0
    assert bool(again.layers[0].router.router.bias.any())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    net = Net()
    with record(net, tmp_path / "t.npz"):
        net(batch(0))
    trace = read_trace(tmp_path / "t.npz")
    with replay(net, trace), pytest.raises(UserError, match=r"layers\.0 routes 7 tokens, and .* was of 32"):
        net(torch.randn(7, D))
    with replay(net, trace):
        net(batch(0))
        with pytest.raises(UserError, match=r"the trace has ended: layers\.0 was recorded in 1 forwards"):
            net(batch(0))
    less = Net()
    less.layers = less.layers[:1]
    with pytest.raises(UserError, match=r"layers\.1 is in one of them alone"), replay(less, trace):
        pass
    with pytest.raises(UserError, match=r"the trace has no layer 'layers\.2'. Did you mean"):
        ReplayRouter(trace, "layers.2")
    with pytest.raises(UserError, match=r"layers\.0 has no router. Play it with weights='recorded'"):
        ReplayRouter(trace, "layers.0")
    with pytest.raises(UserError, match=r"layers\.0 has 3 experts, and its trace is of 4"):
        ReplayRouter(trace, "layers.0", TopKRouter(D, 3))
    with pytest.raises(UserError, match=r"layers\.0 has TaskTableRouter"):
        ReplayRouter(trace, "layers.0", TaskTableRouter(E, [0, 1]))
    with pytest.raises(UserError, match='must be "router" or "recorded"'), replay(net, trace, weights="own"):  # type: ignore[arg-type]
        pass
    with replay(net, trace, share=(0, 3)), pytest.raises(UserError, match="a batch of 32 tokens cannot be"):
        net(batch(0))
    one_choice = Net(lambda: TopKRouter(D, E))
    with replay(one_choice, trace), pytest.raises(UserError, match=r"k=1 needs .* got one of 2 choices"):
        one_choice(batch(0))
    with record(net, tmp_path / "t.npz", weights=False):
        net(batch(0))
    light = read_trace(tmp_path / "t.npz")
    with replay(net, light, weights="recorded"), pytest.raises(UserError, match="was recorded without weights"):
        net(batch(0))
    with replay(net, light):
        net(batch(0))
    assert "forward" not in net.layers[0].router.__dict__


def test_other_padding_is_refused(tmp_path: Path) -> None:
    """Also in the part of one process; a mask without padding is as none."""
    torch.manual_seed(0)
    layer, x = mk.MoELayer(TopKRouter(D, E), mk.experts.GroupedMLP(E, D, 16)), batch(0)
    real = torch.arange(TOKENS) < TOKENS - 2
    with record(layer, tmp_path / "t.npz"):
        layer(x, RoutingContext(mask=real))
        layer(x)
    trace = read_trace(tmp_path / "t.npz")
    with replay(layer, trace):
        assert not layer(x, RoutingContext(mask=real)).hidden[TOKENS - 2 :].any()
        layer(x, RoutingContext(mask=torch.ones(TOKENS, dtype=torch.bool)))
    with (
        replay(layer, trace),
        pytest.raises(UserError, match=r"layer is .* token 30 was padding and is a real token, and 2 of 32"),
    ):
        layer(x)
    for weights in ("router", "recorded"):
        with replay(layer, trace, weights=weights):  # type: ignore[arg-type]
            layer(x, RoutingContext(mask=real))
            with pytest.raises(UserError, match=r"token 5 was a real token and is padding, and 1 of 32"):
                layer(x, RoutingContext(mask=torch.arange(TOKENS) != 5))
    for rank in range(2):
        with replay(layer, trace, share=(rank, 2)):
            layer(x[:16], RoutingContext(mask=real.chunk(2)[rank]))
    with replay(layer, trace, share=(1, 2)), pytest.raises(UserError, match="token 14 was padding"):
        layer(x[16:])


def test_a_forward_of_its_own_needs_a_weighing_of_its_own(tmp_path: Path) -> None:
    class Turned(TopKRouter):
        def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
            return super().forward(-x, context)

    net = Net(lambda: Turned(D, E))
    with record(net, tmp_path / "t.npz"):
        net(batch(0))
    trace = read_trace(tmp_path / "t.npz")
    with pytest.raises(UserError, match=r"layers\.0 has Turned"), replay(net, trace):
        pass
    with pytest.raises(NotImplementedError, match="UniformRouter does not weigh a choice"):
        UniformRouter(E).imposed(batch(0), None, random_routing(TOKENS, E))


# -- another layout ----------------------------------------------------------------------------------------------------


def plain() -> Router:
    """Its capacity is counted by process, so that without a replay two processes drop other tokens than one."""
    return TopKRouter(D, E, 2, capacity=Capacity(train=0.6), renormalise="before_drop", init_scale=1.0)


def smooth() -> Net:
    net = Net(plain)
    net.dropout = nn.Identity()  # type: ignore[assignment]
    return net


def steps(net: Net, rank: int = 0, size: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of one process's part of every batch, trained by plain SGD, and the last gradient norms of experts."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    losses = []
    for step in range(STEPS):
        x = batch(step).chunk(size)[rank]
        loss = (net(x)[0] - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, expert_gradients(net)


def on_two(folder: str) -> dict[str, Any]:
    """Losses under expert parallelism of one process's trace, without it, and what is recorded here."""
    rank, found = dist.get_rank(), dict[str, Any]()

    def divided() -> Net:
        net = smooth()
        parallelize(net, build_meshes(Layout(devices=2, expert_parallel_size=2), "cpu"))
        return net

    net = divided()
    with replay(net, read_trace(f"{folder}/one.npz"), share=(rank, 2)):
        found["replayed"], found["gradients"] = steps(net, rank, 2)
    net = divided()
    file = f"{folder}/two/000000000.rank{rank:05d}.npz"
    with record(net, file, notes={"processes": "2"}):
        found["own"], _ = steps(net, rank, 2)
    return found


def test_a_trace_plays_under_another_layout(tmp_path: Path) -> None:
    """One process's trace on two that share the experts, and theirs on one: the same losses but for rounding."""
    one = smooth()
    with record(one, tmp_path / "one.npz"):
        found, gradients = steps(one)
    losses = torch.tensor(found)
    ranks = run_distributed(on_two, 2, str(tmp_path))
    replayed = torch.tensor([rank["replayed"] for rank in ranks]).mean(0)
    own = torch.tensor([rank["own"] for rank in ranks]).mean(0)
    assert (replayed - losses).abs().max() < 1e-6 * losses.max()
    assert (own - losses).abs().max() > 1e-3, "each drops by a capacity of its own"
    for rank in ranks:
        for name, norms in gradients.items():
            torch.testing.assert_close(rank["gradients"][name], norms)
    back = smooth()
    with replay(back, read_trace(tmp_path / "two")) as playing:
        assert (torch.tensor(steps(back)[0]) - own).abs().max() < 1e-6 * own.max()
        assert playing.left == 0
