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
from moekit.training import loggers, mlflow_logger
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


@pytest.mark.parametrize("told", [None, "http://tracking"])
def test_mlflow_has_a_database_in_the_run_folder_once_it_is_written_to(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Made(CsvLogger):
        def __init__(self, *given: Any, tracking_uri: str | None = told, **options: Any) -> None:
            super().__init__(tmp_path)
            seen.append((given, {"tracking_uri": tracking_uri, **options}))

        def finalize(self, status: str) -> None:
            seen.append(status)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(mlflow_logger, "MLFlowLogger", Made)
    _, made = run_loggers(tmp_path / "my-run", "csv,mlflow")
    made.finalize("success")
    assert seen == []
    assert not (tmp_path / "my-run").exists()
    made.log_metrics({"loss": 1.0}, 3)
    made.log_metrics({"loss": 0.5}, 4)
    made.finalize("success")
    place = tmp_path / "my-run" / "mlflow"
    own = {"tracking_uri": f"sqlite:///{place}/mlflow.db", "artifact_location": str(place / "artifacts")}
    options = {"tracking_uri": told} if told else own
    assert seen == [(("moekit",), {"run_name": "my-run", **options}), "success"]


def test_wandb_gets_the_folder_and_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def make(*args: Any, **options: Any) -> CsvLogger:
        seen.update(options)
        return CsvLogger(tmp_path)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(loggers, "WandbLogger", make)
    assert len(run_loggers(tmp_path / "my-run", "csv,wandb")) == 2
    assert seen["name"] == "my-run"
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
