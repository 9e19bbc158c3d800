"""What every Trainer imports because moekit is installed in its environment: little, and nothing that can fail it."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import moekit_binding
from moekit.component import Component
from moekit.training.callbacks.binding import ComponentBinding

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

QUIET = """
import sys
sys.modules["moekit"] = None  # an import would raise: a moekit that is broken
import logging, warnings
warnings.simplefilter("ignore")
import torch, {package} as pl

class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
    def training_step(self, batch, _):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

trainer = pl.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
assert any("Binding" in type(c).__name__ for c in trainer.callbacks), trainer.callbacks
trainer.fit(Plain(), torch.utils.data.DataLoader(torch.ones(4, 2)))
assert trainer.global_step == 2
assert not [name for name in sys.modules if name.startswith("moekit.")]
"""


def test_the_module_alone_imports_only_the_standard_library(repository: Path) -> None:
    program = (
        "import sys; before = set(sys.modules); import moekit_binding; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    shown = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "['moekit_binding']"


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_a_trainer_of_something_else_imports_nothing_of_moekit(package: str, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET.format(package=package)], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_entry_points_name_functions_that_give_a_callback_of_their_package(package: str, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"][f"{package}.callbacks_factory"]["moekit"].partition(":")
    (callback,) = getattr(importlib.import_module(module), function)()
    assert isinstance(callback, importlib.import_module(package).Callback)
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback), "processes are spawned with it"


def test_every_hook_of_the_real_callback_is_handed_on() -> None:
    own = {name for name in vars(ComponentBinding) if not name.startswith("_")}
    assert own == set(moekit_binding._HOOKS)


def test_an_unknown_lightning_is_said_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moekit_binding._BASES, "LightningBinding", "lightning.of.tomorrow")
    monkeypatch.delitem(vars(moekit_binding), "LightningBinding", raising=False)
    with pytest.warns(UserWarning, match=r"cannot bind to lightning\.of\.tomorrow.*will not move"):
        assert moekit_binding.lightning_callbacks() == []
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = moekit_binding.Other


class Leaf(Component):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.steps: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log("mean", x.detach().mean(), batch_size=1)
        return x * self.weight

    def on_step_end(self, step: int) -> None:
        self.steps.append(step)


@pytest.mark.filterwarnings("ignore:.*lightning_fabric.*:UserWarning")
@pytest.mark.parametrize("package", PACKAGES)
def test_components_log_and_step_under_both_names_and_are_released(package: str, tmp_path: Path) -> None:
    pl = pytest.importorskip(package)

    class Root(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Leaf()])

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.layers[0](batch).sum()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    root = Root()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(root, DataLoader(torch.ones(4, 2)))  # type: ignore[arg-type]
    assert root.layers[0].steps == [1, 2]
    assert "layers.0/mean" in trainer.callback_metrics
    assert root.layers[0]._root is None
