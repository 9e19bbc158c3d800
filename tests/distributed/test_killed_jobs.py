"""kill -9 of one process of a job started by Lightning's own launcher and by torchrun: the job ends, and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moekit.parallel import verify_checkpoint

PROGRAM = Path(__file__).with_name("killed_program.py")
LAUNCHERS = {
    "Trainer": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}


def start(launcher: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the program; whatever it leaves behind is ended too."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], str(PROGRAM), str(folder), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def losses(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Losses by step of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    done = start("Trainer", folder)
    assert done.returncode == 0, done.stdout
    assert list(losses(folder)) == ["1", "2", "3", "4", "5", "6"]
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "moment", "rank"),
    [("Trainer", "step", 1), ("Trainer", "save", 1), ("torchrun", "step", 0), ("torchrun", "save", 0)],
)
def test_a_killed_job_ends_and_is_resumed(
    launcher: str, moment: str, rank: int, tmp_path: Path, uninterrupted: dict[str, float]
) -> None:
    """It ends within a minute of the kill, with a message; resumed, its losses are those of an uninterrupted run."""
    folder = tmp_path / "killed"
    folder.mkdir()
    broken = start(launcher, folder, "--moment", moment, "--rank", str(rank))
    lasted = time.time() - float((folder / "killed").read_text())
    assert broken.returncode != 0
    assert lasted < 60
    assert broken.stdout.strip(), "no message"
    # Killed in the fourth step or in the checkpoint after it: that of the second step is there, whole.
    verify_checkpoint(folder / "last.ckpt")
    resumed = start(launcher, folder, "--resume", "--zero-stage", "2")
    assert resumed.returncode == 0, resumed.stdout
    assert list(losses(folder)) == ["3", "4", "5", "6"]
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(uninterrupted[step], rel=1e-5)
