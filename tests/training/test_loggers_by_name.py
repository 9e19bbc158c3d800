"""Which loggers a run has: chosen by name, refused before anything is made where a package is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.recipes.switch import RECIPE
from moekit.training import loggers
from moekit.training.loggers import CsvLogger, logger_names, run_loggers


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("auto", ["csv", "tensorboard"]),
        ("csv", ["csv"]),
        ("tensorboard", ["csv", "tensorboard"]),
        ("tensorboard, csv", ["csv", "tensorboard"]),
        (("csv", "tensorboard", "csv"), ["csv", "tensorboard"]),
        ("", ["csv"]),
    ],
)
def test_names(given: str | tuple[str, ...], names: list[str], tmp_path: Path) -> None:
    assert logger_names(given) == names
    assert [type(x) for x in run_loggers(tmp_path, given)] == [CsvLogger, TensorBoardLogger][: len(names)]


def test_without_tensorboard_auto_is_the_file_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert logger_names("auto") == ["csv"]
    with pytest.raises(UserError, match=r"tensorboard needs a package that is not installed: pip install tensorboard$"):
        logger_names("tensorboard")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_of_packages_get_the_folder_and_the_name_of_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def make(*args: Any, **options: Any) -> CsvLogger:
        seen.update(options)
        return CsvLogger(tmp_path)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(loggers, {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[name], make)
    assert len(run_loggers(tmp_path / "my-run", f"csv,{name}")) == 2
    assert "my-run" in (seen.get("name"), seen.get("run_name"))
    assert str(seen["save_dir"]).startswith(str(tmp_path / "my-run"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("csv,wandb", "train.loggers wandb needs a package that is not installed: pip install wandb"),
        ("tensorbord", "unknown logger 'tensorbord'. Did you mean 'tensorboard'?"),
    ],
)
def test_refused_before_there_is_a_folder(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(RECIPE, ["fit", "--train.loggers", given, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
