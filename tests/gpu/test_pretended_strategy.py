"""Pieces of the Strategy and of callbacks on a GPU: what lies where, and how often the host waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from devices import explained, gpu
from torch import Tensor, nn

from moekit import ExpertParallelStrategy
from moekit.parallel import unused_gradients
from moekit.parallel.gradients import clip_by_norm, gradient_norm
from moekit.parallel.host_memory import to_host
from moekit.parallel.mesh import World, unflatten
from moekit.routers import TopKRouter
from moekit.training.callbacks import random_state
from moekit.training.callbacks.non_finite import NonFinite
from moekit.training.callbacks.random_state import RandomState
from moekit.training.metrics.perplexity import TokenPerplexity
from moekit.training.metrics.routing import RoutingStatistics
from moekit.training.strategy import move_unsharded_state


class Counting(L.LightningModule):
    """What the Trainer's modules hold beside weights: metrics, one inside a module, and a buffer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.routing, self.inside = RoutingStatistics({"a": 2}), nn.ModuleDict({"valid": TokenPerplexity(["text"])})
        self.register_buffer("table", torch.ones(3))
        self.layer.register_buffer("table", self.table)


def test_what_stays_behind_is_brought_along() -> None:
    """With offloaded weights, or ones drawn from the meta device, nobody calls ``to`` on the module."""
    module = Counting()
    with gpu():
        move_unsharded_state(module, torch.device("cuda", 0))
        assert str(module.device) == "cuda:0"
        assert module.table.is_cuda
        assert module.layer.table is module.table
        assert not module.layer.weight.is_cuda  # weights have their places
        states = [t for m in (module.routing, module.inside["valid"]) for t in m.metric_state.values()]
        assert states
        assert all(state.is_cuda for state in states if isinstance(state, Tensor))
        router = TopKRouter(4, 2, 1).to("cuda")
        module.routing.update({"a": router(torch.randn(6, 4, device="cuda"))})
        module.inside["valid"].update("text", torch.ones(2, device="cuda").sum(), 2)


def test_the_strategy_brings_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """In setup, after the division, whatever the offload."""
    called: list[Any] = []
    monkeypatch.setattr("moekit.training.strategy.move_unsharded_state", lambda *given: called.append(given))
    strategy = ExpertParallelStrategy(1, offload="parameters")
    module = Counting()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module.training_step = lambda *_: None  # type: ignore[method-assign]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    try:
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(2, 4)))  # type: ignore[arg-type]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert [(given[0], given[1].type) for given in called] == [(module, "cpu")]


def test_random_numbers_of_the_device_are_kept_wherever_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer's device counts: a module whose weights are in host memory may say another."""
    state = torch.arange(16, dtype=torch.uint8)
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: given.append((value, device)))
    device = torch.device("cuda", 3)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=device), world_size=1, distributed_sampler_kwargs=None
    )
    module, callback = L.LightningModule(), RandomState()
    assert module.device.type == "cpu"
    callback.on_train_batch_end(trainer, module, None, None, 0)
    again = RandomState()
    again.load_state_dict(callback.state_dict())
    again.on_train_batch_start(trainer, module, None, 1)
    ((value, where),) = given
    assert torch.equal(value, state)
    assert where == device
    given.clear()
    random_state._restore(again._held or {}, torch.device("cpu"))  # resumed without a GPU
    assert not given


# -- groups of processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def both() -> Iterator[None]:
    """One process whose group works on two devices, here with one backend behind both."""
    dist.init_process_group("cpu:gloo,cuda:gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_on_gpus_the_default_group_works_on_the_host_too() -> None:
    for given, device, wanted in (
        (None, "cuda:0", "cpu:gloo,cuda:nccl"),
        ("nccl", "cuda:0", "nccl"),
        (None, "cpu", "gloo"),
    ):
        strategy = ExpertParallelStrategy(process_group_backend=given, parallel_devices=[torch.device(device)])
        strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)  # type: ignore[assignment]
        assert strategy._get_process_group_backend() == wanted


@pytest.mark.usefixtures("both")
def test_groups_of_a_mesh_work_where_the_default_group_does() -> None:
    from datetime import timedelta

    world = World("cpu", 1, timedelta(seconds=77))
    mesh = unflatten(world.all, (1, 1), ("a", "b"), timedelta(seconds=77))
    for group in (world.all.get_group(), mesh.get_group("b")):
        assert "cuda" in dist.get_backend_config(group)
        assert "cpu" in dist.get_backend_config(group)
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)


# -- copies and norms --------------------------------------------------------------------------------------------------


def test_copies_to_the_host_wait_once() -> None:
    values = [torch.randn(n) for n in (3, 1, 5)]
    with gpu() as found:
        there = [value.to("cuda") for value in values]
        with found.watch() as waits:
            copies = to_host(there)
        assert sum(waits.values()) == 1
        assert explained(waits)
        with found.watch() as waits:
            for tensor, host in zip(there, copies, strict=True):
                tensor.zero_().copy_(host.mul_(2), non_blocking=True)
        assert not waits
        for tensor, value in zip(there, values, strict=True):
            assert torch.equal(tensor.cpu(), 2 * value)
        assert copies[0].is_pinned()
        assert not to_host(values)[0].is_pinned()
        assert to_host([]) == []


@pytest.mark.parametrize("norm", [2.0, 1.0, float("inf")])
def test_norms_and_clipping_read_nothing(norm: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(5, 3)).square().sum().backward()
    alone = copy.deepcopy(model)
    for one, other in zip(alone.parameters(), model.parameters(), strict=True):
        one.grad = None if other.grad is None else other.grad.clone()
    wanted = nn.utils.clip_grad_norm_(alone.parameters(), 0.1, norm)
    with gpu() as found:
        there = [nn.Parameter(p.detach().to("cuda")) for p in model.parameters()]
        for one, other in zip(there, model.parameters(), strict=True):
            one.grad = None if other.grad is None else other.grad.to("cuda")
        with found.watch() as waits:
            total = gradient_norm(there, norm)
            clip_by_norm(there, 0.1, norm, norm=total)
        assert not waits
        torch.testing.assert_close(total.cpu(), wanted)
        for one, other in zip(there, alone.parameters(), strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad.cpu(), other.grad)


def test_gradients_on_two_devices_have_one_norm_and_one_copy() -> None:
    """As under offload: those of the host's memory send their norms together."""
    values = [torch.randn(4) for _ in range(5)]
    with gpu() as found:
        parameters = [nn.Parameter(torch.zeros(4, device="cuda"))]
        parameters[0].grad = values[0].to("cuda")
        hosts = [nn.Parameter(torch.zeros(4)) for _ in values[1:]]
        for parameter, value in zip(hosts, values[1:], strict=True):
            parameter.grad = value.clone()
        with found.watch() as waits:
            total = gradient_norm([*hosts, *parameters])
        assert sum(waits.values()) == 1
        assert explained(waits)
        torch.testing.assert_close(total.cpu(), torch.cat(values).norm())
        with found.watch() as waits:
            clip_by_norm([*hosts, *parameters], 0.1, norm=total)
        assert sum(waits.values()) == 1
        assert explained(waits)


def test_who_was_used_is_told_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the kernels of the norm, which come next, would begin when the host has waited for backward."""

    class Divided:
        device_mesh = SimpleNamespace(device_type="cuda")

    monkeypatch.setattr(unused_gradients, "DTensor", Divided)
    parameters: Any = [Divided(), Divided()]
    unused_gradients._used[parameters[1]] = False
    with gpu() as found:
        with found.watch() as waits:
            flags = unused_gradients.used_somewhere(parameters)
        assert not waits, list(map(str, waits))
        assert flags.is_cuda
        assert flags.tolist() == [1.0, 0.0]


def test_the_look_for_what_is_not_finite_is_one_read_a_step() -> None:
    trainer: Any = SimpleNamespace(strategy=None, precision_plugin=None, world_size=1)
    values = {"finite": 1.0, "infinite": float("inf")}
    for name, value in values.items():
        with gpu() as found:
            module: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to("cuda")
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            watch = NonFinite("skip")
            for _ in range(2):  # micro-batches
                loss = module(torch.ones(2, 4, device="cuda")).sum()
                watch.on_before_backward(trainer, module, loss)
                loss.backward()
            module[1].bias.grad.fill_(value)
            with found.watch() as waits:
                watch.on_before_optimizer_step(trainer, module, optimizer)
            assert explained(waits)
            if name == "finite":
                assert sum(waits.values()) == 1
            assert watch._found == (None if name == "finite" else ["1.bias"])
            assert all((parameter.grad is None) == (name != "finite") for parameter in module.parameters())


# -- the norm, once ----------------------------------------------------------------------------------------------------


def test_the_norm_is_found_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the log, the look and the clipping; twice where a hook may have changed gradients in between."""
    from moekit.parallel import gradients
    from moekit.training import strategy_optimizers

    calls: list[int] = []
    original = gradients.gradient_norm

    def counted(parameters: Any, norm_type: float = 2.0) -> Tensor:
        calls.append(1)
        return original(parameters, norm_type)

    monkeypatch.setattr(gradients, "gradient_norm", counted)
    monkeypatch.setattr(strategy_optimizers, "gradient_norm", counted)

    class Halves(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.grad.to_local().data.mul_(0.5)

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            nn.init.constant_(self.layer.weight, 1.0)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.layer(torch.ones(1, 4)).sum() * 0.3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    # Gradients of 0.3 in four places have the norm 0.6; halved, 0.3, which needs no clipping.
    cases: list[Any] = [([], 1, 0.3 * 0.5 / 0.6), ([NonFinite()], 1, 0.3 * 0.5 / 0.6), ([Halves()], 2, 0.15)]
    for callbacks, times, step in cases:
        calls.clear()
        module = Model()
        trainer = L.Trainer(
            accelerator="cpu", devices=1, strategy=ExpertParallelStrategy(1), max_steps=1, gradient_clip_val=0.5,
            callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.fit(module, torch.utils.data.DataLoader(torch.ones(1, 4)))  # type: ignore[arg-type]
            weight = module.layer.weight.to_local()  # type: ignore[operator]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        assert len(calls) == times
        assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(0.6)
        torch.testing.assert_close(weight.detach(), torch.full((1, 4), 1 - step), rtol=1e-5, atol=0)
