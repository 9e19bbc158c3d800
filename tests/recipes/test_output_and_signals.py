"""Runs from the command line whose terminal goes away, whose output nobody reads, or that are told twice to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from moekit.training import processes

SMALL = [
    "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=2", "--data.babel_sentences=60",
    "--data.vocab_size=400", "--train.warmup_steps=1", "--train.accelerator=cpu", "--train.log_every=1",
]  # fmt: skip


def start(folder: Path, steps: int, *more: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moekit.recipes.switch", "fit", *SMALL, f"--train.max_steps={steps}", *more]
    places = ["--out", str(folder / "run"), "--data.cache", str(folder / "cache")]
    return subprocess.Popen([*command, *places], text=True, **options)


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    """Until some rows are written, which is when a second row begins."""
    path = folder / "run" / "metrics.csv"
    while not path.exists() or path.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.1)


def answer_to_ctrl_c(process: subprocess.Popen[str], stderr: IO[str]) -> str:
    """Press Ctrl-C, and read standard error until it is answered: two at once may be one to Python."""
    process.send_signal(signal.SIGINT)
    said = ""
    while "Press it again" not in said:
        line = stderr.readline()
        assert line, f"ended without an answer: {said}"
        said += line
    return said


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["closed", "read by nobody"])
def test_training_goes_on_without_output(closed: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    options: dict[str, Any] = {"stdout": writer, "stderr": writer}
    if closed == "closed":
        options = {"preexec_fn": lambda: (os.close(1), os.close(2))}
    process = start(tmp_path, 12, **options)
    os.close(writer)
    assert process.wait(timeout=240) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 13


def test_a_terminal_that_goes_away_is_a_signal_to_save(tmp_path: Path) -> None:
    """As a shell does it: SIGHUP, and from then on no output."""
    process = start(tmp_path, 1_000_000, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_steps(process, tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 129
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_nohup_and_two_ctrl_c(tmp_path: Path) -> None:
    """A SIGHUP that is held off stays held off; a second Ctrl-C does not wait for the step's end."""
    held_off: Any = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = start(
        tmp_path, 1_000_000, "--tasks.span_corruption.tokens=200000", stderr=subprocess.PIPE, preexec_fn=held_off
    )
    wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    assert process.stderr is not None
    errors = answer_to_ctrl_c(process, process.stderr)
    process.send_signal(signal.SIGINT)  # the step under way takes several seconds more
    errors += process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("interrupted\n")
    assert "Stopped by" not in errors, "the step was not waited for"


@pytest.mark.slow
@pytest.mark.parametrize("signals", [2, 1], ids=["at once", "after the step"])
def test_ctrl_c_again_and_again(signals: int, tmp_path: Path) -> None:
    """However often, also while the interpreter shuts down: the process ends once, with the code of the first."""
    more = ["--tasks.span_corruption.tokens=100000"] if signals == 2 else []
    process = start(tmp_path, 1_000_000, *more, stderr=subprocess.PIPE)
    wait_for_steps(process, tmp_path)
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr))  # type: ignore[arg-type]
    reader.start()
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    while not any("interrupted" in line or "Stopped by SIGINT" in line for line in said):
        assert process.poll() is None, said
        time.sleep(0.001)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    reader.join()
    process.stderr.close()
    assert process.returncode == 130, said
    assert "Traceback" not in "".join(said), said


def test_lightning_waits_until_survivors_have_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would kill this process within five seconds, in the middle of what it says."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(process))
    monkeypatch.setattr(processes, "_SECONDS_TO_TELL", 0.5)
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    child.wait()
    observer = _ChildProcessObserver(main_pid=1234, child_processes=[child], sleep_period=0)
    release = threading.Event()
    monkeypatch.setattr(observer, "_run", lambda: release.wait(60) and _ChildProcessObserver._run(observer))
    observer.start()
    processes.let_survivors_tell()
    release.set()
    time.sleep(0.2)
    assert not killed
    observer.join(timeout=60)
    assert killed == [1234]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["--strategy.expert_parallel_size=2"]], ids=["whole", "divided"])
def test_a_process_that_dies_is_named_and_what_it_left_goes(layout: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, 1_000_000, "--devices=2", "--train.checkpoint_steps=5", *layout, stderr=subprocess.PIPE)
    wait_for_steps(process, tmp_path)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"stopped: rank 1 (process {child}) has ended with code -9" in errors
    assert "Traceback" not in errors
    draft = tmp_path / "run" / "checkpoints" / ".last.ckpt.0123abcd.tmp"
    draft.mkdir(parents=True, exist_ok=True)
    (draft / "half").write_text("written")
    resumed = start(tmp_path, 2, "--devices=2", "--resume", *layout)  # more steps were made: nothing is trained
    assert resumed.wait(timeout=240) == 0
    assert not draft.exists()
