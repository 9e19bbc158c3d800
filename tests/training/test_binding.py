"""Nested components: their logs under dotted paths, their step hook, and their life outside a Trainer."""

from __future__ import annotations

import copy
import csv
import gc
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from moekit.component import Component, bind, components
from moekit.experts import GroupedMLP
from moekit.layer import MoELayer
from moekit.routers import TopKRouter
from moekit.training.callbacks.binding import ComponentBinding
from moekit.training.multitask import MultitaskModule
from moekit_binding import lightning_callbacks

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Scale(Component):
    """A leaf that logs from forward and counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.steps: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log("mean", x.detach().mean(), batch_size=len(x))
        return x * self.weight

    def on_step_end(self, step: int) -> None:
        self.steps.append(step)
        self.log("steps", float(len(self.steps)))


class Outer(Component):
    """A component inside which another hangs in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Scale(), Scale()])

    def forward(self, x: Tensor) -> Tensor:
        self.log_dict({"max": x.detach().max(), "min": x.detach().min()}, batch_size=len(x))
        for module in self.inner:
            x = module(x)
        return x


class Root(L.LightningModule):
    """A user's module that knows nothing of moekit."""

    def __init__(self, *, recompute: bool = False, late: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.late = late
        self.layers = nn.ModuleList([] if late else [nn.Linear(4, 4), Outer()])

    def configure_model(self) -> None:
        if self.late and not self.layers:
            self.layers.extend([nn.Linear(4, 4), Outer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        return x

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, _: int) -> None:
        self(batch)

    test_step = validation_step

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class ManualRoot(Root):
    """Two optimizers, both stepping in every batch but the second only every other one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        loss = self(batch).square().mean()
        self.manual_backward(loss)
        if index % 3 != 2:  # every third batch nothing steps
            first.step()
            if index % 2 == 0:
                second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [
            torch.optim.SGD(self.layers[0].parameters(), 1e-3),
            torch.optim.SGD(self.layers[1].parameters(), 1e-3),
        ]


def data(batches: int = 7) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(batches * 2, 4), batch_size=2)  # type: ignore[arg-type]


def trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(settings | kwargs))


def leaf(root: Root) -> Scale:
    return root.layers[1].inner[0]  # type: ignore[no-any-return, union-attr, index]


def test_every_trainer_loads_the_binding_by_itself(tmp_path: Path) -> None:
    (ours,) = lightning_callbacks()
    assert sum(type(c) is type(ours) for c in trainer(tmp_path).callbacks) == 1


@pytest.mark.parametrize("late", [False, True])
def test_nested_logs_reach_the_loggers_under_the_dotted_path(tmp_path: Path, late: bool) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, logger=logger)
    run.fit(Root(late=late), data(), data(2))
    names = {"layers.1.inner.0/mean", "layers.1.inner.1/mean", "layers.1/max", "layers.1/min"}
    assert names <= set(run.callback_metrics)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert names <= set(rows[0])
    assert sum(row["layers.1.inner.0/mean"] != "" for row in rows) == 8  # seven steps, one validation mean
    assert {name for name in rows[0] if "steps" in name} == {
        "layers.1.inner.0/steps",
        "layers.1.inner.1/steps",
    }


@pytest.mark.parametrize("kind", [Root, ManualRoot])
def test_activation_checkpointing_logs_once(tmp_path: Path, kind: type[Root]) -> None:
    class Summing(Scale):
        def forward(self, x: Tensor) -> Tensor:
            self.log("calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return x * self.weight

    root = kind(recompute=True)
    root.layers[1].inner[1] = Summing()  # type: ignore[union-attr, operator]
    run = trainer(tmp_path)
    run.fit(root, data())
    assert run.callback_metrics["layers.1.inner.1/calls"] == 7


def test_step_hook_runs_once_per_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    root = Root()
    trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2).fit(root, data(7))
    assert leaf(root).steps == [1, 2, 3, 4, 5, 6]  # 7 batches: 3 + 3 + the last one alone
    assert root.layers[1].inner[1].steps == leaf(root).steps  # type: ignore[union-attr, index]


def test_step_hook_runs_once_per_batch_that_stepped_with_two_optimizers(tmp_path: Path) -> None:
    root = ManualRoot()
    trainer(tmp_path).fit(root, data(7))
    # Batches 0, 4 and 6 step both optimizers, 1 and 3 only the first, 2 and 5 none.
    assert leaf(root).steps == [2, 3, 4, 6, 8]


def test_step_hook_goes_on_after_resume_without_repeating(tmp_path: Path) -> None:
    root = Root()
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=2, save_top_k=-1)
    trainer(tmp_path, max_steps=4, callbacks=[saver], enable_checkpointing=True).fit(root, data())
    path = saver.best_model_path
    content = torch.load(path, weights_only=True)
    assert not any("Binding" in key for key in content["callbacks"])

    resumed = Root()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plain DataLoader cannot resume in the middle of an epoch
        trainer(tmp_path, max_steps=6).fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert leaf(resumed).steps == [5, 6]


def test_a_checkpoint_holds_what_the_step_hook_changed(tmp_path: Path) -> None:
    class Counting(Scale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def on_step_end(self, step: int) -> None:
            self.count += 1

    root = Root()
    root.layers[1].inner[0] = Counting()  # type: ignore[union-attr, operator]
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, max_steps=3, callbacks=[saver], enable_checkpointing=True).fit(root, data())
    for step in (1, 2, 3):
        state = torch.load(tmp_path / "ckpt" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert state["layers.1.inner.0.count"] == step


def test_a_second_binding_does_not_double_the_step_hook(tmp_path: Path) -> None:
    root = Root()
    trainer(tmp_path, max_steps=3, callbacks=[ComponentBinding()]).fit(root, data())
    assert leaf(root).steps == [1, 2, 3]


def test_validation_and_test_log_and_predict_is_silent(tmp_path: Path) -> None:
    root = Root()
    run = trainer(tmp_path)
    assert "layers.1.inner.0/mean" in run.validate(root, data(2), verbose=False)[0]
    assert "layers.1.inner.0/mean" in run.test(root, data(2), verbose=False)[0]
    assert len(run.predict(root, data(2))) == 2


def test_hooks_that_may_not_log_are_silent(tmp_path: Path) -> None:
    class Early(Root):
        def on_fit_start(self) -> None:
            self(torch.ones(2, 4))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self(torch.ones(2, 4))
            return super().configure_optimizers()

    run = trainer(tmp_path, max_steps=1)
    run.fit(Early(), data())
    assert run.global_step == 1


def test_component_as_the_root_logs_under_its_own_name(tmp_path: Path) -> None:
    class Whole(Root, Component):
        seen = 0

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            self.log("loss", 1.0)
            return super().training_step(batch, index)

        def on_step_end(self, step: int) -> None:
            self.seen = step

    root = Whole()
    run = trainer(tmp_path, max_steps=3)
    run.fit(root, data())
    assert root.seen == 3
    assert {"loss", "layers.1/max"} <= set(run.callback_metrics)


def test_component_knows_trainer_and_step_inside_a_run_and_is_free_after_it(tmp_path: Path) -> None:
    seen: list[tuple[Any, int, str]] = []

    class Curious(Scale):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.trainer, self.global_step, self.path))
            return super().forward(x)

    root = Root()
    root.layers[1].inner[0] = Curious()  # type: ignore[union-attr, operator]
    run = trainer(tmp_path, max_steps=2)
    run.fit(root, data())
    assert seen == [(run, 0, "layers.1.inner.0"), (run, 1, "layers.1.inner.0")]
    assert leaf(root).path == ""
    assert leaf(root).global_step == 0
    with pytest.raises(RuntimeError, match="not attached"):
        _ = leaf(root).trainer


def test_components_are_released_after_an_exception(tmp_path: Path) -> None:
    class Failing(Root):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            raise RuntimeError("broken")

    root = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path).fit(root, data())
    assert leaf(root)._root is None
    assert leaf(root)._trainer is None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda root: pickle.loads(pickle.dumps(root))])
def test_a_bound_module_can_be_copied_and_its_copy_is_unbound(tmp_path: Path, copier: Any) -> None:
    copies: list[Root] = []

    class CopyingRoot(Root):
        def on_train_batch_end(self, *_: Any) -> None:
            copies.append(copier(self.layers))

    root = CopyingRoot()
    trainer(tmp_path, max_steps=1).fit(root, data())
    (layers,) = copies
    assert layers[1].inner[0]._root is None
    assert layers[1].inner[0]._trainer is None
    for ours, theirs in zip(root.layers.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    layers[1](torch.ones(2, 4))  # logs nowhere


def test_logging_without_a_trainer_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    Root()(torch.ones(2, 4))
    root = Root()
    bind(root)
    root(torch.ones(2, 4))
    Scale()(torch.ones(2, 4))
    assert not recwarn.list


def test_wrappers_leave_no_trace_in_the_path(tmp_path: Path) -> None:
    root = Root()
    root.layers[1].inner[1] = torch.compile(root.layers[1].inner[1], backend="eager")  # type: ignore
    bind(root)
    paths = {c.path for c in components(root).values()}
    assert paths == {"layers.1", "layers.1.inner.0", "layers.1.inner.1"}


def test_binding_keeps_no_module_alive() -> None:
    root = Root()
    bind(root)
    child, reference = leaf(root), weakref.ref(root)
    del root
    gc.collect()
    assert reference() is None
    child(torch.ones(2, 4))  # its root is gone: silent


def test_a_model_without_components_is_left_alone(tmp_path: Path) -> None:
    class Plain(Root):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

    run = trainer(tmp_path, max_steps=2)
    root = Plain()
    run.fit(root, data())
    assert not run.callback_metrics
    assert components(root) == {}


def test_a_folder_is_no_checkpoint_file(tmp_path: Path) -> None:
    """Lightning alone would end in an IsADirectoryError, which names no way out."""

    class Counting(Component):
        def __init__(self, size: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(size, size)

    for kind in (Counting, MultitaskModule):
        with pytest.raises(ValueError, match=r"load_from_checkpoint needs a file: .* is a folder.*best.ckpt"):
            kind.load_from_checkpoint(tmp_path)
    made = Counting(3)
    plain = trainer(tmp_path, max_steps=1)
    plain.strategy.connect(made)
    plain.save_checkpoint(tmp_path / "a.ckpt")
    found = Counting.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found.layer.weight, made.layer.weight)


class Sparse(Root):
    """Two sparse layers that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoELayer(TopKRouter(4, 2), GroupedMLP(2, 4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).hidden
        return x


def test_a_sparse_layer_that_trains_in_evaluation_is_warned_of_once(tmp_path: Path) -> None:
    """Not one in training, nor one that does not learn."""

    def said(model: Sparse) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, max_epochs=2).fit(model, data(2), data(1))
        return [str(w.message) for w in caught if "train in evaluation mode" in str(w.message)]

    assert said(Sparse()) == []
    model = Sparse()
    model.layers[1].eval()
    (message,) = said(model)
    assert "1 sparse layers train in evaluation mode, layers.1 first: " in message
    assert "needs train()" in message
    model.layers[1].requires_grad_(False)
    assert said(model) == []
    (message,) = said(Sparse().eval())
    assert "2 sparse layers train in evaluation mode, layers.0 first: " in message
