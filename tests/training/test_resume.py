"""A run that is stopped in the middle and resumed equals one that was never stopped, step for step."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("resume_program.py")
STEPS = 24


class Run:
    """The program in a folder."""

    def __init__(self, folder: Path, loader: str) -> None:
        self.folder, self.loader = folder, loader
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *, pause: float = 0.0, resume: bool = False, tear: int = -1) -> subprocess.Popen[str]:
        how = "resume" if resume else "new"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self.folder), str(pause), self.loader, how, str(tear)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return (self.folder / "end.txt").read_text()

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "metrics.csv").read_text().splitlines()))

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Return as soon as the row of `step` is written."""
        path = self.folder / "metrics.csv"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and f"\n{step}," in path.read_text():
                return
            time.sleep(0.002)
        raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[dict[str, str]]]]:
    """End and rows of runs that were never stopped."""
    ends = {}
    for loader in ("epochs", "endless"):
        run = Run(tmp_path_factory.mktemp(loader), loader)
        ends[loader] = (run.finish(run.start()), run.rows())
        assert [row["step"] for row in ends[loader][1]] == [str(n) for n in range(STEPS)]
    return ends


def same(run: Run, end: str, whole: dict[str, tuple[str, list[dict[str, str]]]]) -> None:
    expected_end, expected_rows = whole[run.loader]
    assert run.rows() == expected_rows  # every loss, learning rate and validation, in full precision
    assert end == expected_end


# Steps 6 to 8 are in the middle of an epoch, 9 is followed by its end, 11 by a validation.
@pytest.mark.parametrize(
    ("loader", "number", "step"),
    [("epochs", "TERM", 6), ("epochs", "TERM", 9), ("epochs", "INT", 11), ("endless", "TERM", 7)],
)
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(
    tmp_path: Path, loader: str, number: str, step: int, whole: dict[str, tuple[str, list[dict[str, str]]]]
) -> None:
    run = Run(tmp_path / "run", loader)
    process = run.start(pause=0.02)
    run.wait_for_step(step, process)
    process.send_signal(getattr(signal, f"SIG{number}"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == {"TERM": 143, "INT": 130}[number], errors
    assert f"Stopped by SIG{number} after step" in errors
    assert "Resume with: program --resume" in errors
    assert not (run.folder / "end.txt").exists()
    assert len(run.rows()) < STEPS
    same(run, run.finish(run.start(resume=True)), whole)


@pytest.mark.parametrize(("loader", "step"), [("epochs", 8), ("endless", 12)])
def test_a_kill_is_resumed_from_the_last_checkpoint(
    tmp_path: Path, loader: str, step: int, whole: dict[str, tuple[str, list[dict[str, str]]]]
) -> None:
    run = Run(tmp_path / "run", loader)
    process = run.start(pause=0.02)
    run.wait_for_step(step, process)
    process.kill()
    process.communicate()
    same(run, run.finish(run.start(resume=True)), whole)


def test_a_kill_in_the_middle_of_a_save_leaves_the_former_checkpoint_whole(
    tmp_path: Path, whole: dict[str, tuple[str, list[dict[str, str]]]]
) -> None:
    run = Run(tmp_path / "run", "epochs")
    process = run.start(tear=8)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    torn = list((run.folder / "checkpoints").glob(".last.ckpt.*.tmp"))
    assert len(torn) == 1
    same(run, run.finish(run.start(resume=True)), whole)
    assert not torn[0].exists()


def test_a_run_survives_two_stops(tmp_path: Path, whole: dict[str, tuple[str, list[dict[str, str]]]]) -> None:
    run = Run(tmp_path / "run", "epochs")
    for step, resume in ((4, False), (15, True)):
        process = run.start(pause=0.02, resume=resume)
        run.wait_for_step(step, process)
        process.terminate()
        process.communicate(timeout=120)
        assert process.returncode == 143
    same(run, run.finish(run.start(resume=True)), whole)
