"""A run that is stopped in the middle and resumed equals one that was never stopped, step for step."""

from __future__ import annotations

import csv
import signal
import socket
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import resume_program
from resume_program import Strike

STEPS = resume_program.STEPS
Whole = dict[str, tuple[str, list[dict[str, str]]]]


@pytest.fixture(scope="module", autouse=True)
def _server(forkserver: ForkServerContext) -> None:
    Run.context = forkserver


class Run:
    """The program in a folder."""

    context: ForkServerContext

    def __init__(self, folder: Path, loader: str) -> None:
        self.folder, self.loader = folder, loader

    def start(
        self, *, resume: bool = False, strike: Strike | None = None, rank: int = 0, world: int = 1, port: int = 0
    ) -> BaseProcess:
        process = self.context.Process(
            target=resume_program.in_process, args=(self.folder, self.loader, resume, strike, rank, world, port)
        )
        process.start()
        return process

    def end(self, process: BaseProcess, rank: int = 0) -> tuple[int | None, str]:
        """Exit code and standard error."""
        process.join(timeout=120)
        errors = self.folder / f"errors{rank}.txt"
        return process.exitcode, errors.read_text() if errors.exists() else ""

    def finish(self, process: BaseProcess) -> str:
        code, errors = self.end(process)
        assert code == 0, errors
        return (self.folder / "end.txt").read_text()

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "metrics.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """End and rows of runs that were never stopped."""
    ends = {}
    for loader in ("epochs", "endless"):
        run = Run(tmp_path_factory.mktemp(loader), loader)
        ends[loader] = (run.finish(run.start()), run.rows())
        assert [row["step"] for row in ends[loader][1]] == [str(n) for n in range(STEPS)]
    return ends


def same(run: Run, end: str, whole: Whole) -> None:
    expected_end, expected_rows = whole[run.loader]
    assert run.rows() == expected_rows  # every loss, learning rate and validation, in full precision
    assert end == expected_end


# An epoch is five steps long; validation comes after steps 3, 6, 9, ...; checkpoints after 2, 4, 6, ...
@pytest.mark.parametrize(
    ("loader", "strike", "saved"),
    [
        ("epochs", Strike("TERM", 7, "first batch"), 7),  # gradients are half accumulated
        ("epochs", Strike("TERM", 10, "second batch"), 10),  # the end of an epoch
        ("epochs", Strike("INT", 12, "second batch"), 12),  # a validation and a checkpoint are due
        ("epochs", Strike("TERM", 15, "second batch"), 15),  # the end of an epoch, and a validation is due
        ("epochs", Strike("INT", 9, "validation"), 10),  # in a validation after which no checkpoint was due
        ("epochs", Strike("TERM", 18, "validation"), 18),  # in one after which a checkpoint was due
        ("epochs", Strike("TERM", STEPS, "first batch"), STEPS),  # all steps are done, what follows them is not
        ("epochs", Strike("HUP", 5, "first batch"), 5),
        ("endless", Strike("TERM", 7, "first batch"), 7),
        ("endless", Strike("TERM", 9, "second batch"), 9),
        ("endless", Strike("TERM", STEPS, "first batch"), STEPS),
    ],
    ids=str,
)
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(
    tmp_path: Path, loader: str, strike: Strike, saved: int, whole: Whole
) -> None:
    run = Run(tmp_path / "run", loader)
    code, errors = run.end(run.start(strike=strike))
    assert code == {"TERM": 143, "INT": 130, "HUP": 129}[strike.name], errors
    assert f"Stopped by SIG{strike.name} after step {saved}; everything is in" in errors
    assert "Resume with: program --resume" in errors
    assert not (run.folder / "end.txt").exists()
    assert [row["step"] for row in run.rows()] == [str(n) for n in range(saved)]
    same(run, run.finish(run.start(resume=True)), whole)


@pytest.mark.parametrize(
    ("loader", "strike"),
    [
        ("epochs", Strike("KILL", 8, "second batch")),
        ("epochs", Strike("KILL", 11, "second batch")),  # the last checkpoint is of an epoch's end
        ("epochs", Strike("KILL", 15, "validation")),
        ("epochs", Strike("KILL", 1, "first batch")),  # before any checkpoint
        ("endless", Strike("KILL", 13, "first batch")),
        ("epochs", Strike("KILL", 8, "saved")),  # before the values of the checkpoint's own step are logged
        ("epochs", Strike("KILL", 10, "saved")),
    ],
    ids=str,
)
def test_a_kill_is_resumed_from_the_last_checkpoint(tmp_path: Path, loader: str, strike: Strike, whole: Whole) -> None:
    run = Run(tmp_path / "run", loader)
    assert run.end(run.start(strike=strike))[0] == -signal.SIGKILL
    same(run, run.finish(run.start(resume=True)), whole)


def test_a_kill_in_the_middle_of_a_save_leaves_the_former_checkpoint_whole(tmp_path: Path, whole: Whole) -> None:
    run = Run(tmp_path / "run", "epochs")
    assert run.end(run.start(strike=Strike("KILL", 8, "save")))[0] == -signal.SIGKILL
    torn = list((run.folder / "checkpoints").glob(".last.ckpt.*.tmp"))
    assert len(torn) == 1
    same(run, run.finish(run.start(resume=True)), whole)
    assert not torn[0].exists()


def test_a_run_survives_two_stops(tmp_path: Path, whole: Whole) -> None:
    run = Run(tmp_path / "run", "epochs")
    for step, resume in ((4, False), (17, True)):
        code, errors = run.end(run.start(resume=resume, strike=Strike("TERM", step, "first batch")))
        assert code == 143, errors
    same(run, run.finish(run.start(resume=True)), whole)


def pair(run: Run, *, resume: bool = False, strike: Strike | None = None) -> list[tuple[int | None, str]]:
    """The run in two processes; how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [run.start(resume=resume, strike=strike, rank=rank, world=2, port=port) for rank in (0, 1)]
    return [run.end(process, rank) for rank, process in enumerate(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("strike", [Strike("TERM", 7, "first batch"), Strike("INT", 12, "validation")], ids=str)
def test_two_processes_agree_on_a_signal_to_one_and_resume_exactly(tmp_path: Path, strike: Strike) -> None:
    whole, stopped = Run(tmp_path / "whole", "epochs"), Run(tmp_path / "stopped", "epochs")
    assert [code for code, _ in pair(whole)] == [0, 0]
    ends = pair(stopped, strike=strike)
    # The process that got no signal of its own reports the agreed stop as a SIGTERM.
    assert [code for code, _ in ends] == [143, {"TERM": 143, "INT": 130}[strike.name]], ends
    assert 0 < len(stopped.rows()) < STEPS
    ends = pair(stopped, resume=True)
    assert [code for code, _ in ends] == [0, 0], ends
    assert stopped.rows() == whole.rows()
    assert (stopped.folder / "end.txt").read_text() == (whole.folder / "end.txt").read_text()
