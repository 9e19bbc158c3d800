"""Run folders, atomic files and checkpoints, and metrics.csv."""

from __future__ import annotations

import csv
import errno
import getpass
import json
import os
import pickle
import platform
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from moekit.atomic import replacing, write_json, write_text
from moekit.errors import UserError
from moekit.recipes.switch import RECIPE as SWITCH
from moekit.runs import Run
from moekit.runs.plain import as_plain, differences, plain
from moekit.runs.settings import TrainConfig
from moekit.training.callbacks.config import ConfigInCheckpoints
from moekit.training.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from moekit.training.loggers import CsvLogger, run_loggers

CONFIG = {"model": {"dim": 8, "layers": (1, 2)}, "train": {"lr": 1e-3, "minutes": None}, "out": Path("runs/x")}


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files over 100 kB fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_is_asked_for_by_name_and_else_the_average_comes_before_the_best_and_the_last(
    tmp_path: Path,
) -> None:
    folder = Run.create(tmp_path, CONFIG)
    for name in ("last", "best", "average"):
        (folder.checkpoints / f"{name}.ckpt").touch()
        assert folder.best_checkpoint == Run.open(tmp_path).checkpoint == folder.checkpoints / f"{name}.ckpt"
    assert Run.open(tmp_path, "last").checkpoint == folder.checkpoints / "last.ckpt"
    (folder.checkpoints / "best.ckpt").unlink()
    with pytest.raises(UserError, match="has no checkpoint best: it has average, last"):
        Run.open(tmp_path, "best")


def test_settings_that_a_former_version_lacks_have_their_defaults() -> None:
    now = SWITCH.current({"recipe": "switch", "train": {"max_steps": 7}, "evaluate": {}})
    assert now["train"] == {**as_plain(TrainConfig()), "max_steps": 7}
    assert (now["evaluate"]["score_valid"], now["evaluate"]["bleu_tokenizer"]) == (0, "auto")
    assert "data" not in now
    model = as_plain(type(SWITCH.default.model)())
    assert SWITCH.current({"recipe": "switch", "model": {"dim": 8}})["model"] == {**model, "dim": 8}


def test_a_new_run_has_configuration_and_environment(tmp_path: Path) -> None:
    folder = Run.create(tmp_path / "a" / "run", CONFIG)
    assert folder.settings == {
        "model": {"dim": 8, "layers": [1, 2]},
        "train": {"lr": 1e-3, "minutes": None},
        "out": "runs/x",
    }
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    assert environment["torch_threads"] == torch.get_num_threads()
    assert len(environment["commit"]["id"]) == 40
    text = json.dumps(environment)
    assert platform.node() not in text
    assert len(getpass.getuser()) < 5 or getpass.getuser() not in text
    assert folder.checkpoints.is_dir()
    assert folder.last_checkpoint is folder.best_checkpoint is None
    assert folder.summary is None
    assert Run.open(folder.path) == folder


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = Run.create(tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"holds an unfinished run. Go on with it \(--resume\)"):
        Run.create(tmp_path, CONFIG)
    write_json(folder.path / "summary.json", {})
    (folder.checkpoints / "last.ckpt").write_text("x")
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds a finished run"):
        Run.create(tmp_path, CONFIG)
    with pytest.raises(UserError, match="exclude each other"):
        Run.create(tmp_path, CONFIG, resume=True, overwrite=True)
    Run.create(tmp_path, CONFIG, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.yaml", "environment.json", "notes.txt"]
    assert os.listdir(folder.checkpoints) == []


def test_resume_takes_up_the_run_and_refuses_another_configuration(tmp_path: Path) -> None:
    folder = Run.create(tmp_path, CONFIG)
    (folder.checkpoints / "last.ckpt").write_text("x")
    assert Run.create(tmp_path, CONFIG, resume=True).last_checkpoint == folder.checkpoints / "last.ckpt"
    other: Any = {**CONFIG, "model": {"dim": 16, "layers": [1, 2]}, "train": {"lr": 1e-3, "minutes": 3.0, "new": 1}}
    with pytest.raises(UserError) as caught:
        Run.create(tmp_path, other, resume=True)
    for line in ("model.dim (8 there, 16 now)", "train.minutes (None there, 3.0 now)", "train.new (None there, 1 now)"):
        assert line in str(caught.value)
    with pytest.raises(UserError) as caught:
        Run.create(tmp_path, other, resume=True, free=["train"])
    assert "train." not in str(caught.value)
    Run.create(tmp_path, other, resume=True, free=["train", "model.dim"])
    assert folder.settings["model"]["dim"] == 16


def test_resume_without_a_run_begins_one(tmp_path: Path) -> None:
    assert Run.create(tmp_path / "run", CONFIG, resume=True).last_checkpoint is None


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"it has 'thesis.tex' and no config.yaml"):
            Run.create(tmp_path, CONFIG, **options)
    with pytest.raises(UserError, match="holds no run"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="it is a file"):
        Run.create(tmp_path / "thesis.tex", CONFIG)
    with pytest.raises(UserError, match="a file is in the place of a folder"):
        Run.create(tmp_path / "thesis.tex" / "run", CONFIG)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "\xff"])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.yaml must"):
        _ = Run.open(tmp_path).settings


def test_differences_are_dotted() -> None:
    assert differences({"a": {"b": 1, "c": (1, 2)}, "d": {}}, {"a": {"b": 2, "c": [1, 2]}, "e": 0}) == {
        "a.b": (1, 2),
        "d": ({}, None),
        "e": (None, 0),
    }


def test_configuration_must_be_plain_data(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be plain data: got set"):
        Run.create(tmp_path / "run", {"a": {1}})


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [float("nan"), float("inf"), 1.5], "ü": (True, None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, None, 1.5], "ü": [True, None]}


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(UserError, match=f"cannot write x.txt in the folder {tmp_path}: the file is larger"):
        write_text(tmp_path / "x.txt", "n" * 200_000)
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=f"cannot write x.ckpt in the folder {tmp_path}"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, tmp_path / "x.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["x.ckpt", "x.txt"]
    assert (tmp_path / "x.txt").read_text() == "old"
    assert load_checkpoint(tmp_path / "x.ckpt")["a"].shape == (3,)


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EROFS, "read-only; choose another folder")],
)
def test_full_and_read_only_disks_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"in the folder {tmp_path / 'run'}: .*{message}"):
        Run.create(tmp_path / "run", CONFIG)
    assert os.listdir(tmp_path / "run") == []


def test_an_exception_inside_replacing_is_passed_on(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert os.listdir(tmp_path) == []


def test_checkpoints_with_code_and_broken_ones_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "x.ckpt"
    torch.save({"a": Evil()}, path)
    with pytest.raises(UserError, match="tensors and plain data only"):
        AtomicCheckpointIO().load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"tensors and plain data only|broken"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="broken or not a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="broken or not a checkpoint"):
        load_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(UserError, match="must hold a dictionary: got list"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="There is no checkpoint at"):
        load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        callbacks=[ConfigInCheckpoints(plain(CONFIG))],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    run = Run(tmp_path)
    assert run.checkpoint_to_resume(CONFIG) is None
    path = tmp_path / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    assert run.checkpoint_to_resume(CONFIG) == path
    with pytest.raises(UserError, match=r"(?s)last.ckpt to resume it.*train.lr \(0.001 there, 0.1 now\)"):
        run.checkpoint_to_resume({**CONFIG, "train": {"lr": 0.1, "minutes": None}})
    torch.save({}, path)
    with pytest.raises(UserError, match="must hold the configuration of its run"):
        run.checkpoint_to_resume(CONFIG)


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_csv_puts_a_step_into_one_row_and_grows_columns(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.continue_from(0)
    logger.log_metrics({"train/loss": 1.0, "epoch": 0}, step=0)
    logger.save()
    logger.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, step=1)
    logger.save()
    logger.log_metrics({"valid/loss": 2.0, "a": 3}, step=1)
    logger.save()
    logger.log_metrics({"train/loss": 3.0}, step=2)
    logger.log_metrics({"a": 4}, step=2)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,a,valid/loss",
        "0,0,1.0,,",
        "1,0,0.30000000000000004,3,2.0",
        "2,,3.0,4,",
    ]


def test_csv_is_right_after_every_save(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    for step in range(3):
        for name in ("x", "y", "x"):
            logger.log_metrics({name: step}, step=step)
            logger.save()
            assert [row["step"] for row in rows(tmp_path)] == [str(n) for n in range(step + 1)]
            assert rows(tmp_path)[-1][name] == str(step)


def test_csv_continues_a_run_and_drops_what_will_be_written_again(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    for step in range(6):
        logger.log_metrics({"b": step}, step=step)
    logger.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,,6")  # torn by a kill
    again = CsvLogger(tmp_path)
    again.continue_from(4)
    assert [row["b"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]
    again.log_metrics({"b": 40, "c": 1}, step=4)
    again.save()
    assert [(row["step"], row["b"], row["c"]) for row in rows(tmp_path)][-2:] == [("3", "3", ""), ("4", "40", "1")]
    again.continue_from(0)
    assert rows(tmp_path) == []


def test_csv_of_a_test_keeps_the_rows_of_training(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"b": 1}, step=7)
    logger.save()
    other = CsvLogger(tmp_path)
    other.log_metrics({"test/bleu": 30.0}, step=0)
    other.finalize("success")
    assert [(row["step"], row["test/bleu"]) for row in rows(tmp_path)] == [("7", ""), ("0", "30.0")]


@pytest.mark.usefixtures("small_files")
def test_csv_on_a_full_disk_is_explained_and_can_be_continued(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    message = f"cannot write metrics.csv in the folder {tmp_path}"

    def write() -> None:
        for step in range(1000):
            logger.log_metrics({"x" * 50: float(step) + 1e-9, **{f"y{n}": 0.123456789012345 for n in range(9)}}, step)
            logger.save()

    with pytest.raises(UserError, match=message):
        write()
    CsvLogger(tmp_path).continue_from(200)
    assert [row["step"] for row in rows(tmp_path)] == [str(n) for n in range(200)]


def test_run_loggers_write_into_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    loggers = run_loggers(tmp_path)
    for logger in loggers:
        logger.log_metrics({"x": 1.0}, step=0)
        logger.save()
        logger.finalize("success")
    assert (tmp_path / "metrics.csv").is_file()
    assert list((tmp_path / "tensorboard").glob("events*"))
