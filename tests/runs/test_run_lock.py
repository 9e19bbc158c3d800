"""A run folder belongs to one process; a start that fails leaves none."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from moekit.cli.recipes import main
from moekit.errors import UserError
from moekit.lock import held
from moekit.recipes import switch
from moekit.runs import Run

HOLD = """
import sys, time
from pathlib import Path
from moekit.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
SMALL = [
    "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=2", "--data.babel_sentences=60",
    "--data.vocab_size=400", "--train.warmup_steps=1", "--train.max_steps=2", "--train.accelerator=cpu",
]  # fmt: skip


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the folder ``run``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_folder_is_refused_until_its_owner_is_dead(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(UserError, match=rf"in use by process {owner.pid} on {socket.gethostname()}:"), held(folder):
            pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with held(folder):
        assert json.loads((folder / ".owner.json").read_text())["pid"] == os.getpid()
    assert os.listdir(folder) == []
    with held(folder):  # and once more
        pass


def test_commands_that_write_are_refused_and_those_that_read_are_not(
    tmp_path: Path, owner: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    Run.create(folder, {"recipe": "switch", "variant": "tiny"})
    before = sorted(os.listdir(folder))
    for option in ("--resume", "--overwrite"):
        assert main(switch.RECIPE, ["fit", *SMALL, "--out", str(folder), option]) == 2
        assert f"is in use by process {owner.pid} on {socket.gethostname()}" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == before
    assert Run.open(folder).settings["recipe"] == "switch"


def test_a_process_that_the_owner_starts_does_not_hold_the_folder(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with held(tmp_path / "run"):
            pass
    finally:
        child.kill()
        child.wait()


def test_folders_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["x"]


def test_an_owner_on_another_host_that_did_not_end_in_order_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".owner.json").write_text('{"pid": 7, "host": "far"}')
    with held(tmp_path):
        assert "was last held by process 7 on far, which did not end in order" in capsys.readouterr().err


def test_a_file_system_without_locks_is_said_and_goes_by_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FileLock, *args: Any, **options: Any) -> None:
        Path(self.lock_file).touch()
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with held(tmp_path):
        assert "has no locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(UserError, match=rf"was taken by process {os.getpid()} on .*delete .*\.owner\.json"):  # noqa: SIM117
            with held(tmp_path):
                pass


# -- starts that fail ----------------------------------------------------------------------------------------------


def bad_text(folder: Path) -> list[str]:
    folder.mkdir()
    for name, text in (("en", "one\ntwo\n"), ("de", "eins\n")):
        for split in ("train", "valid", "test"):
            (folder / f"{split}.{name}").write_text(text)
    return ["--data.source", "moses", "--data.path", str(folder)]


FAILURES: dict[str, tuple[list[str], str]] = {
    "no such text": (["--data.source", "moses", "--data.path", "/there/is/none"], "/there/is/none"),
    "lines that do not match": ([], "2"),
    "a setting out of its range": (["--train.accumulate", "0"], "train.accumulate"),
    "no end of training": (["--train.max_steps", "0", "--train.max_minutes", "0"], "training needs an end"),
    "a model that cannot be": (["--model.dim", "15"], "15"),
    "a GPU that is not there": (["--train.accelerator=gpu", "--train.precision=32-true"], "needs a GPU"),
    "a layout that does not fit": (["--devices", "2", "--strategy.expert_parallel_size", "3"], "divide"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_start_leaves_no_folder(failure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words = FAILURES[failure]
    if failure == "lines that do not match":
        options = bad_text(tmp_path / "text")
    cache = ["--data.cache", str(tmp_path / "cache")]
    assert main(switch.RECIPE, ["fit", *SMALL, *cache, "--out", str(tmp_path / "runs" / "run"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_taken_port_leaves_no_folder(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        program = [sys.executable, "-m", "moekit.recipes.switch", "fit", *SMALL, "--devices", "2"]
        places = ["--out", str(tmp_path / "runs" / "run"), "--data.cache", str(tmp_path / "cache")]
        environment = {**os.environ, "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [*program, *places], capture_output=True, text=True, timeout=200, check=False, env=environment
        )
    assert done.returncode == 2, done.stderr
    assert "the port at which the processes meet must be free" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failure_after_the_folder_was_filled_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert (tmp_path / "run" / "config.yaml").exists()
        raise RuntimeError("before the first batch")

    monkeypatch.setattr("lightning.Trainer.fit", fail)
    with pytest.raises(RuntimeError, match="before the first batch"):
        main(switch.RECIPE, ["fit", *SMALL, "--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
