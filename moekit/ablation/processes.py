"""Runs of a table in processes of their own, several at once, with one thread each; stopped and gone on with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import yaml

from moekit.ablation.plan import Job
from moekit.atomic import write_json, write_text, writing
from moekit.errors import UserError
from moekit.lock import InUseError, held
from moekit.runs.plain import as_plain, with_setting
from moekit.runs.record import STOPPED
from moekit.runs.run import SUMMARY
from moekit.stored import parse_json

State = Literal["done", "diverged", "failed", "unfinished"]

_POLL = 0.2  # seconds
_PATIENCE = 120.0
"""Seconds for runs to write their checkpoints once they are told to end."""
_ONE_THREAD = ("env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1")
_BORROWED = ("checkpoints", "tokenizer", "held_out.json.gz", "environment.json")
"""What a run that only evaluates another's model has of it."""

Commands = Callable[[Job, Path], list[list[str]]]
"""The commands that make a run in a folder, one after the other."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run beside its folder, in ``FOLDER.json``.

    Attributes:
        state: done, diverged (its numbers came to NaN or infinity), failed (it ended by an error or was stopped, and is
            tried again next time), or unfinished.
        minutes: processor minutes that its processes have taken, all tries together.
        kin: of which runs it takes the time; see `Job.kin`.
        said: the last line of one that diverged or failed.
    """

    state: State = "unfinished"
    minutes: float = 0.0
    kin: str = ""
    said: str = ""

    @classmethod
    def of(cls, folder: Path) -> RunRecord:
        """That of a run folder; unfinished where there is none, or it is damaged."""
        try:
            known = parse_json(_record(folder).read_text(encoding="utf-8"))
            found = cls(**{name: known[name] for name in ("state", "minutes", "kin", "said")})
        except (OSError, ValueError, TypeError, KeyError):
            found = cls()
        if found.state == "done" and not (folder / SUMMARY).is_file():  # somebody has deleted it
            return replace(found, state="unfinished")
        return found

    @property
    def final(self) -> bool:
        """Whether it is a result: nothing is run again."""
        return self.state in ("done", "diverged")


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write what is known of a run beside its folder."""
    write_json(_record(folder), vars(record))


def measured_minutes(runs: Path) -> dict[str, float]:
    """Processor minutes of finished runs in a folder by `Job.kin`: the mean."""
    found: dict[str, list[float]] = {}
    for path in runs.glob("*-*.json"):
        record = RunRecord.of(path.with_suffix(""))
        if record.state == "done":
            found.setdefault(record.kin, []).append(record.minutes)
    return {kin: sum(minutes) / len(minutes) for kin, minutes in found.items()}


class Watcher(Protocol):
    """Who is told how the runs go."""

    def begin(self, job: Job, going_on: bool) -> None:
        """A run begins, or goes on."""

    def step(self, running: Mapping[str, tuple[Job, int]]) -> None:
        """Runs that are under way by digest, each with its last optimizer step that is known."""

    def end(self, job: Job, record: RunRecord) -> None:
        """A run has ended."""


@dataclass
class _Running:
    """A run under way."""

    job: Job
    folder: Path
    left: list[list[str]]
    log: Any
    process: subprocess.Popen[bytes] | None = None
    minutes: float = 0.0
    record: RunRecord = field(default_factory=RunRecord)


def run_all(
    jobs: Sequence[Job], runs: Path, *, at_once: int, watcher: Watcher, commands: Commands | None = None
) -> dict[str, RunRecord]:
    """Make every run that is not there yet; returns the records of all, by digest.

    A run that was stopped goes on by its own ``--resume``. One that is done, or has diverged, is not run again. The
    folder is held meanwhile. Ctrl-C, SIGTERM and SIGHUP let the runs write their checkpoints, and end.

    Args:
        jobs: in the order in which they begin; a run stands behind the one that it is of.
        runs: the folder of all runs.
        at_once: number of processes.
        watcher: is told.
        commands: that make a run; None = `moekit_commands`.

    Raises:
        UserError: a run refuses its settings, or another process holds the folder.
        KeyboardInterrupt: after an orderly end.
    """
    make = moekit_commands if commands is None else commands
    with runs_held(runs), _signals_interrupt():
        waiting = [job for job in jobs if not RunRecord.of(job.folder(runs)).final]
        running: list[_Running] = []
        try:
            while waiting or running:
                while len(running) < at_once and (job := _next(waiting, runs)) is not None:
                    waiting.remove(job)
                    running.append(_begin(job, runs, make, watcher))
                if not running:  # what is left is of runs that have failed
                    break
                time.sleep(_POLL)
                for one in list(running):
                    if _advanced(one):
                        running.remove(one)
                        _end(one, watcher)
                watcher.step({one.job.digest: (one.job, last_step(one.folder)) for one in running})
        finally:
            _stop(running)
    return {job.digest: RunRecord.of(job.folder(runs)) for job in jobs}


@contextlib.contextmanager
def runs_held(runs: Path) -> Iterator[None]:
    """`moekit.lock.held` for the folder of all runs.

    Raises:
        InUseError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(runs))
        except InUseError as error:
            raise InUseError(
                f"the runs in {runs} are made by another ablate: wait until it ends, stop it, or give another folder "
                "with --runs."
            ) from error
        yield


def moekit_commands(job: Job, folder: Path) -> list[list[str]]:
    """The commands of an ordinary run, of one that goes on with another's model, or of the test of that."""
    program = [sys.executable, "-m", "moekit"]
    if job.trains:
        settings = folder.with_name(f"{folder.name}.yaml")
        config = job.config
        if job.given_as and job.of is not None:
            config = with_setting(config, job.given_as, str(job.of.folder(folder.parent)))
        plain = {"recipe": job.recipe, **as_plain(config)}
        write_text(settings, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        before, begin = _beginning(job, folder)
        command = [*program, *begin, "--config", str(settings), "--out", str(folder), "--resume"]
        return [*([*program, *each] for each in before), command]
    assert job.of is not None, "what does not train has another's model"
    trained, test = job.of.folder(folder.parent), [*program, "test", "--out", str(folder)]
    if job.prune:
        options = _options(job.prune)
        done = (folder / "config.yaml").is_file()
        return [*([] if done else [[*program, "prune", str(trained), *options, "--out", str(folder)]]), test]
    _borrow(job, trained, folder)
    return [test]


def _beginning(job: Job, folder: Path) -> tuple[list[list[str]], list[str]]:
    """What is done before a run that trains, and how its command begins."""
    if job.of is None or job.given_as:
        return [], ["run", job.recipe, "--variant", job.variant]
    start = job.of.folder(folder.parent)
    if job.distill is not None:
        return [], ["distill", job.recipe, "--teacher", str(start), *_group("distill", job.distill)]
    changed: list[str] = []
    if job.joined is not None:
        changed = ["aggregate", str(start), str(job.joined.folder(folder.parent)), *_options(job.aggregate)]
    elif job.prune:
        changed = ["prune", str(start), *_options(job.prune)]
    before = []
    if changed:
        start = folder.with_name(f"{folder.name}.begin")
        if not (folder / "config.yaml").is_file():
            before = [[*changed, "--out", str(start), "--overwrite"]]
    return before, ["finetune", job.recipe, "--init_from", str(start), *_group("fine_tune", job.fine_tune or ())]


def _group(name: str, options: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"--{name}.{key}={value}" for key, value in options]


def _options(given: Sequence[tuple[str, Any]]) -> list[str]:
    """Options of a command without groups: a flag where one is true, nothing where it is false."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given if value is not False]


def _borrow(job: Job, trained: Path, folder: Path) -> None:
    """A run folder with the trained model of another, by links, under settings of its own."""
    plain = {"recipe": job.recipe, "variant": job.variant, **as_plain(job.config)}
    with writing(folder):
        folder.mkdir(exist_ok=True)
        for name in _BORROWED:
            if (trained / name).exists() and not os.path.lexists(folder / name):
                (folder / name).symlink_to(Path("..") / trained.name / name)
    write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _next(waiting: Sequence[Job], runs: Path) -> Job | None:
    """The first run that can begin: that of a trained model waits for it, and is left out where that has failed."""
    for job in waiting:
        if all(RunRecord.of(other.folder(runs)).state == "done" for other in job.needs):
            return job
    return None


def _begin(job: Job, runs: Path, make: Commands, watcher: Watcher) -> _Running:
    folder = job.folder(runs)
    going_on = folder.is_dir()
    _wait_until_free(folder)
    commands = make(job, folder)
    log = folder.with_name(f"{folder.name}.log").open("ab")
    one = _Running(job, folder, commands, log, record=RunRecord.of(folder))
    watcher.begin(job, going_on)
    _start(one)
    return one


def _wait_until_free(folder: Path) -> None:
    """Wait for a run whose `ablate` was killed and which has not noticed: it writes to the folder until its end."""
    while folder.is_dir():
        try:
            with held(folder):
                return
        except UserError as error:
            if "in use" not in str(error):
                raise
            time.sleep(5 * _POLL)


def _start(one: _Running) -> None:
    one.process = subprocess.Popen(
        [*_ONE_THREAD, *one.left.pop(0)], stdin=subprocess.DEVNULL, stdout=one.log, stderr=one.log,
        start_new_session=True,  # a Ctrl-C is this process's to pass on
    )  # fmt: skip


def _advanced(one: _Running) -> bool:
    """Look after a run; whether it has ended, in which case its record says how."""
    assert one.process is not None
    code = _reap(one)
    if code is None:
        return False
    if code == 0 and one.left:
        _start(one)
        return False
    said = _last_line(one.folder)
    state: State = "failed"
    if code == 0 and (one.folder / SUMMARY).is_file():
        state, said = "done", ""
    elif code == 1 and said.startswith("stopped:") and _is_not_finite(one.folder):
        state = "diverged"
    elif code == 2:
        _write(one, "failed", said)
        raise UserError(f"the run {one.job.label} was refused: {said.removeprefix('error:').strip()}")
    elif code < 0:
        said = f"it was ended by signal {-code}"
    _write(one, state, said)
    return True


def _is_not_finite(folder: Path) -> bool:
    """Whether training stopped at numbers that are not finite, and not by a monitor or with a process that ended."""
    try:
        return bool(parse_json((folder / STOPPED).read_text(encoding="utf-8"))["not_finite"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _reap(one: _Running) -> int | None:
    """The exit code of its process, whose processor time is counted; None while it runs."""
    assert one.process is not None
    if one.process.returncode is None:
        if not hasattr(os, "wait4"):  # not a POSIX system: no processor times
            return one.process.poll()
        pid, status, used = os.wait4(one.process.pid, os.WNOHANG)
        if pid:
            one.process.returncode = os.waitstatus_to_exitcode(status)
            one.minutes += (used.ru_utime + used.ru_stime) / 60
    return one.process.returncode


def _write(one: _Running, state: State, said: str = "") -> None:
    one.record = RunRecord(state, one.record.minutes + one.minutes, one.job.kin, said)
    write_record(one.folder, one.record)
    one.log.close()


def _end(one: _Running, watcher: Watcher) -> None:
    watcher.end(one.job, one.record)


def _stop(running: Sequence[_Running]) -> None:
    """End what still runs: runs write a checkpoint upon SIGTERM; those that take too long are killed."""
    for one in running:
        if one.process is not None and _reap(one) is None:
            one.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for one in running:
        with contextlib.suppress(KeyboardInterrupt):  # the next one says: now
            while _reap(one) is None and time.monotonic() < deadline:
                time.sleep(_POLL)
        if one.process is not None and _reap(one) is None:
            one.process.kill()
            one.process.wait()
        if not one.log.closed:
            _write(one, "unfinished")


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP are what Ctrl-C is."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: whoever called it deals with signals
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                former[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def last_step(folder: Path) -> int:
    """The last optimizer step that a run's metrics.csv knows; 0 before the first."""
    try:
        with (folder / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            lines = file.read().split(b"\n")
        return max((int(line.partition(b",")[0]) for line in lines[1:-1] if line[:1].isdigit()), default=0)
    except (OSError, ValueError):
        return 0


def _last_line(folder: Path) -> str:
    """The last line of a run's log that says something; of an error that was told in one message, its first."""
    try:
        text = folder.with_name(f"{folder.name}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines[-20:] if line.startswith(("stopped:", "error:"))]
    return (told or lines or [""])[-1]
