"""Routers with state move equally under every trainer and in a plain loop; where nobody tells them they warn."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import moekit as mk
from moekit.experts import DensePretraining, GroupedMLP
from moekit.routers import Balance, ReLURouter, TopKRouter, dense_to_sparse, loss_free
from moekit.routers.dense_to_sparse import DenseToSparseRouter, ExponentialDecay
from moekit.routing import Router, Routing, RoutingContext
from moekit.stepping import stop_listening
from moekit.testing import seeded, skewed_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*lightning_fabric.*:UserWarning"),
]

D, E, TOKENS, STEPS, MICRO = 6, 4, 10, 3, 2


class Layers(nn.Module):
    """Two sparse layers with every kind of state, and a plain module's interface: `loss` of a batch."""

    def __init__(self, build: Callable[[], list[Router]]) -> None:
        super().__init__()
        with seeded(1):
            self.layers = nn.ModuleList(
                mk.MoELayer(router, GroupedMLP(E, D, 4), phase=phase)
                for router, phase in zip(build(), (None, DensePretraining(2)), strict=True)
            )
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.normal_(std=0.3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(int(1e4 * x.detach().abs().sum()))  # the same Gumbel noise, whatever else drew before
        loss = x.new_zeros(())
        for layer in self.layers:
            output = layer(x)
            x = x + output.hidden
            loss = loss + sum(output.routing.losses.values())
        return {"loss": loss + x.square().mean()}


def shared_relu() -> list[Router]:
    first = ReLURouter(D, E, 1)
    return [first, ReLURouter(D, E, 1, coefficient=first.coefficient)]


KINDS: dict[str, Callable[[], list[Router]]] = {
    "loss-free": lambda: [loss_free(D, E, k=2, update_rate=0.2) for _ in range(2)],
    "dense-to-sparse": lambda: [dense_to_sparse(D, E, decay_steps=4, threshold=0.2) for _ in range(2)],
    "ReMoE": lambda: [ReLURouter(D, E, 1) for _ in range(2)],
    "ReMoE with one coefficient": shared_relu,
    "global balance": lambda: [TopKRouter(D, E, balance=Balance(scope="global")) for _ in range(2)],
}


def batches() -> Tensor:
    return torch.stack([skewed_tokens(TOKENS, D, seed=seed) for seed in range(STEPS * MICRO)])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def by_hand(model: Layers, folder: Path) -> None:
    """The reference: nothing of moekit's helps, every router and every part is told explicitly, in evaluation order."""
    optimizer = sgd(model)
    routers = [layer.router for layer in model.layers]
    heard: list[tuple[Router, Routing]] = []
    hooks = [r.register_forward_hook(lambda router, _, routing: heard.append((router, routing))) for r in routers]
    for number, x in enumerate(batches(), start=1):
        (model(x)["loss"] / MICRO).backward()
        for router, routing in heard:
            router.observe(routing)
        heard.clear()
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            for layer in model.layers:
                layer.router.on_step_end(number // MICRO)
                layer.on_step_end(number // MICRO)
    for hook in hooks:
        hook.remove()


def plain_loop(model: Layers, folder: Path) -> None:
    optimizer = sgd(model)
    mk.listen(model)
    for number, x in enumerate(batches(), start=1):
        (model(x)["loss"] / MICRO).backward()
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            mk.step_end(model)


def checkpointed_loop(model: Layers, folder: Path) -> None:
    """With activation checkpointing, evaluation in the middle of a step, and the step said."""
    optimizer = sgd(model)
    mk.listen(model)
    for number, x in enumerate(batches(), start=1):
        loss = checkpoint(lambda x: model(x)["loss"], x.requires_grad_(), use_reentrant=number % 2 == 0)
        (loss / MICRO).backward()
        model.eval()(x.detach())
        model.train()
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            mk.step_end(model, number // MICRO)


def fabric(model: Layers, folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, sgd(model))
    mk.listen(wrapped)
    for number, x in enumerate(batches(), start=1):
        with fabric.no_backward_sync(wrapped, enabled=number % MICRO != 0):
            fabric.backward(wrapped(x)["loss"] / MICRO)
        if number % MICRO == 0:
            optimizer.step()
            optimizer.zero_grad()
            mk.step_end(wrapped)


SETTINGS: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": MICRO,
}  # fmt: skip


def fit(lightning: Any, model: Layers, folder: Path) -> None:
    class Root(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.model(batch)["loss"]  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    loader = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type,var-annotated]
    lightning.Trainer(default_root_dir=folder, **SETTINGS).fit(Root(), loader)


def lightning_trainer(model: Layers, folder: Path) -> None:
    fit(L, model, folder)


def pytorch_lightning_trainer(model: Layers, folder: Path) -> None:
    fit(pytest.importorskip("pytorch_lightning"), model, folder)


def transformers_trainer(model: Layers, folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs it")
    transformers = pytest.importorskip("transformers")
    from moekit.training.callbacks.huggingface import StepEndCallback

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=MICRO, num_train_epochs=1,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        lr_scheduler_type="constant", average_tokens_across_devices=False,
    )  # fmt: skip

    class InOrder(transformers.Trainer):  # type: ignore[misc,name-defined]
        def get_train_dataloader(self) -> Any:
            return [{"x": x} for x in batches()]

    InOrder(
        model, arguments, train_dataset=list(batches()), optimizers=(sgd(model), None), callbacks=[StepEndCallback()]
    ).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "train",
    [plain_loop, checkpointed_loop, fabric, lightning_trainer, pytorch_lightning_trainer, transformers_trainer],
    ids=lambda train: train.__name__,
)
def test_state_moves_equally_everywhere(kind: str, train: Callable[[Layers, Path], None], tmp_path: Path) -> None:
    """Weights and state after three steps of two micro-batches are those of a loop that tells everyone by hand."""
    start, expected, found = (Layers(KINDS[kind]) for _ in range(3))
    by_hand(expected, tmp_path)
    train(found, tmp_path)
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    for layer in found.layers:
        assert layer.phase is None or not layer.phase.active
        assert layer.router._step_watch._warned is False
    state = dict(found.named_buffers())
    if kind != "global balance":
        moved = [name for name, was in start.named_buffers() if not torch.equal(was, state[name])]
        assert {name.rpartition(".")[2] for name in moved} >= {"done"}
        assert any(name.startswith("layers.0.router") for name in moved)


def test_a_wrong_loop_moves_otherwise(tmp_path: Path) -> None:
    """The comparison above can fail: without a call, and with one per micro-batch, the state is another."""
    expected, never, often = (Layers(KINDS["loss-free"]) for _ in range(3))
    by_hand(expected, tmp_path)
    for model, period in ((never, STEPS * MICRO + 1), (often, 1)):
        mk.listen(model)
        optimizer = sgd(model)
        for number, x in enumerate(batches(), start=1):
            (model(x)["loss"] / MICRO).backward()
            if number % period == 0:
                mk.step_end(model)
            if number % MICRO == 0:
                optimizer.step()
                optimizer.zero_grad()
        assert not torch.equal(model.layers[0].router.bias, expected.layers[0].router.bias)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_shared_router_and_two_forwards_before_a_backward_are_told_once_each(recompute: bool) -> None:
    """Nothing moves between a forward and its recomputation, even where a router is called again in between."""
    router = TopKRouter(D, E, balance=Balance(scope="global"))
    plain = copy.deepcopy(router)
    mk.listen(router)

    def run(router: Router, x: Tensor) -> Tensor:
        return router(x).losses["load_balance"]  # type: ignore[no-any-return]

    gradients = []
    for r in (router, plain):
        total = torch.zeros(())
        for x in batches()[:3]:
            x = x.clone().requires_grad_()
            again = recompute and r is router
            total = total + (checkpoint(run, r, x, use_reentrant=False) if again else run(r, x))
        total.backward()
        gradients.append(r.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    router(batches()[3])  # the next micro-batch: now the three are told
    expected = sum(plain.balance.load(plain(x)) for x in batches()[:3])
    assert torch.equal(router._window.counts, expected)
    mk.step_end(router)
    assert router._window.counts is None


def told(kind: str = "loss-free") -> tuple[Layers, torch.optim.Optimizer]:
    model = Layers(KINDS[kind])
    return model, sgd(model)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["loss-free", "dense-to-sparse", "ReMoE"])
def test_a_forgotten_call_warns_once(kind: str) -> None:
    model, optimizer = told(kind)
    x = batches()[0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")  # as everywhere outside of tests: one text from one place once
        for _ in range(25):
            update(model, optimizer, x)
    routers = [w for w in seen if type(model.layers[0].router).__name__ in str(w.message)]
    assert len(routers) == 1
    assert "moekit.step_end(model)" in str(routers[0].message)
    assert [w for w in seen if "DensePretraining moves" in str(w.message)]


@pytest.mark.parametrize(
    "quiet", ["accumulation", "evaluation", "stateless", "frozen", "told by hand", "step_end", "recomputed"]
)
def test_a_loop_that_is_right_does_not_warn(quiet: str) -> None:
    model, optimizer = told()
    if quiet == "stateless":
        model = nn.ModuleList([mk.MoELayer(mk.routers.switch(D, E), GroupedMLP(E, D, 4))])
        model.forward = lambda x: {"loss": model[0](x).hidden.square().mean()}  # type: ignore[assignment]
        optimizer = sgd(model)
    for module in model.modules():
        if quiet == "frozen" and isinstance(module, mk.Component):
            module.frozen = True
    if quiet == "step_end":
        mk.listen(model)
    for number, x in enumerate(batches().repeat(5, 1, 1)):
        if quiet in ("accumulation", "recomputed"):
            if quiet == "recomputed":
                x = x.clone().requires_grad_()
                checkpoint(lambda x: model(x)["loss"], x, use_reentrant=False).backward()
            else:
                model(x)["loss"].backward()
            continue
        update(model.eval() if quiet == "evaluation" else model, optimizer, x)
        if quiet == "told by hand":
            for layer in model.layers:
                layer.router.on_step_end(number + 1)
                layer.on_step_end(number + 1)
        if quiet == "step_end":
            mk.step_end(model)


def test_step_end_before_listen_warns_and_hears_from_then_on() -> None:
    model, optimizer = told()
    update(model, optimizer, batches()[0])
    with pytest.warns(UserWarning, match="called before listen, so what LossFreeRouter"):
        mk.step_end(model)
    assert not model.layers[0].router.bias.any()
    update(model, optimizer, batches()[1])
    mk.step_end(model)
    assert model.layers[0].router.bias.any()


def test_steps_are_counted_from_where_the_state_stands() -> None:
    model, _ = told("dense-to-sparse")
    for expected in (1, 2):
        mk.step_end(model)
        assert int(model.layers[0].router.step) == expected
    mk.step_end(model, 7)
    again, _ = told("dense-to-sparse")
    again.load_state_dict(model.state_dict())
    mk.step_end(again)
    assert int(again.layers[0].router.step) == 8
    with pytest.raises(ValueError, match="0 or more: got -1"):
        mk.step_end(again, -1)


def test_step_zero_only_listens_and_nothing_without_components() -> None:
    model, optimizer = told()
    mk.step_end(model, 0)
    update(model, optimizer, batches()[0])
    mk.step_end(model)
    assert model.layers[0].router.bias.any()
    mk.step_end(nn.Linear(2, 2))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_not_listened_to_until_asked(copier: Any) -> None:
    model, _ = told()
    mk.listen(model)
    model(batches()[0])
    twin = copier(model.layers)
    router = twin[0].router
    router(batches()[0])
    assert router._ear is None
    mk.listen(twin)
    router(batches()[0])
    assert len(router._ear.pending) == 1
    stop_listening(twin)
    assert not router._forward_hooks
    stop_listening(model)
    assert not model.layers[0].router._forward_hooks


def test_a_call_on_a_router_reaches_its_parts() -> None:
    """ReMoE's state is in a part of the router: by the router's own two methods, and by step_end, it adapts."""
    for tell in (lambda router, step: router.on_step_end(step), mk.step_end):
        router = ReLURouter(D, E, 1)
        for step in (1, 2, 3):
            router.observe(router(batches()[step]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                tell(router, step)
        assert int(router.coefficient.exponent) == 3, "half of the pairs are on, a quarter is wanted: up each time"
    router.coefficient.frozen = True
    router.observe(router(batches()[0]))
    router.on_step_end(4)
    assert int(router.coefficient.exponent) == 3


def test_a_compiled_layer_is_heard() -> None:
    torch._dynamo.reset()
    model, optimizer = told()
    twin, twin_optimizer = told()
    for m in (model, twin):
        mk.listen(m)
    model.layers[0].compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, where a graph breaks
        for x in batches()[:3]:
            for m, o in ((model, optimizer), (twin, twin_optimizer)):
                update(m, o, x)
                mk.step_end(m)
    assert torch.equal(model.layers[0].router.bias, twin.layers[0].router.bias)
    assert model.layers[0].router.bias.any()


class WithState(DenseToSparseRouter):
    """A user's router whose parts hold the state."""

    class Heat(mk.Component):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []

        def on_step_end(self, step: int) -> None:
            self.steps.append(step)

    def __init__(self) -> None:
        super().__init__(D, E, ExponentialDecay(1.0, 0.5, 4))
        self.heat = self.Heat()

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        return super().forward(x, context)


def test_step_end_reaches_every_part_once() -> None:
    router = WithState()
    mk.step_end(nn.ModuleDict({"a": router, "b": router}))
    mk.step_end(router)
    assert router.heat.steps == [1, 2]
