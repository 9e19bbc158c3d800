"""The numbers of finished runs in small files beside the results, so that work on a table goes on elsewhere.

Run folders are large and stay where they were made. What a result asks of them is kept in a file each, which can be
committed: whoever makes the table then, on any machine, makes only the runs that nobody has made.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.ablation.plan import Job
from moekit.ablation.processes import RunRecord, runs_held, write_record
from moekit.atomic import write_json, write_text
from moekit.errors import UserError
from moekit.runs.run import MECHANISMS, SUMMARY
from moekit.stored import parse_json

VERSION = 1
_ENVIRONMENT, _METRICS = "environment.json", "metrics.csv"
_RUN = "run"
"""The name of the run, which that of the file begins with; not there in the first files."""
_TOLD = ("summary", "mechanisms", "last", "commit")


def keep(jobs: Sequence[Job], runs: Path, kept: Path) -> None:
    """Keep the numbers of the jobs that have ended with a result, unless they are kept already.

    Args:
        jobs: of a table.
        runs: the folder of all run folders.
        kept: the folder of the small files.
    """
    for job in jobs:
        record, path = RunRecord.of(job.folder(runs)), _path(job, kept)
        if record.final and not path.is_file():
            folder = job.folder(runs)
            environment = _read(folder / _ENVIRONMENT)
            found = {
                "summary": _read(folder / SUMMARY),
                "mechanisms": _read(folder / MECHANISMS),
                "last": _last_values(folder / _METRICS),
                "commit": environment.get("commit"),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": VERSION, _RUN: folder.name, "record": vars(record), **found})


def restore(jobs: Sequence[Job], runs: Path, kept: Path) -> int:
    """Put the numbers of kept runs where a table looks for them; returns of how many.

    A run whose trained model another job of the table evaluates is left out, unless that one is kept too: its numbers
    alone do not replace its checkpoint. The folder of the runs is held where there is something to put there.

    Raises:
        InUseError: another process holds that folder.
        UserError: a file is damaged, of a later version, or has the numbers of another run.
    """
    if not _found(jobs, runs, kept):
        return 0
    with runs_held(runs):
        found = _found(jobs, runs, kept)  # what was made until the folder was held stays
        for job in found:
            _put(job, runs, _path(job, kept))
    return len(found)


def _found(jobs: Sequence[Job], runs: Path, kept: Path) -> list[Job]:
    """Jobs without a result here that have a kept one."""
    missing = [job for job in jobs if not RunRecord.of(job.folder(runs)).final]
    without = {other.digest for job in missing if not _path(job, kept).is_file() for other in job.needs}
    return [job for job in missing if _path(job, kept).is_file() and job.digest not in without]


def _put(job: Job, runs: Path, path: Path) -> None:
    """Write a run folder of what its kept file has."""
    known = _checked(path, job)
    folder = job.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((SUMMARY, known["summary"]), (MECHANISMS, known["mechanisms"])):
        if values:
            write_json(folder / name, values)
    write_text(folder / _METRICS, _table(known["last"]))
    write_json(folder / _ENVIRONMENT, {"commit": known["commit"]})
    write_record(folder, RunRecord(**known["record"]))


def _path(job: Job, kept: Path) -> Path:
    return kept / f"{job.folder(kept).name}.json"


def _checked(path: Path, job: Job) -> dict[str, Any]:
    """The kept file of a job."""
    try:
        known = parse_json(path.read_text(encoding="utf-8"))
        if known["version"] != VERSION or not {"record", *_TOLD} <= set(known):
            problem = f"it must be of version {VERSION}, with {', '.join(('record', *_TOLD))}"
        elif not _has_result(record := RunRecord(**known["record"]), known):
            problem = "it must have the numbers of a run that is done, or has diverged"
        elif known.get(_RUN, path.stem) != path.stem or record.kin != job.kin:
            problem = "it has the numbers of another run"
        else:
            return dict(known)
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = str(error)
    raise UserError(f"{path} cannot be used: {problem}. Delete it to run it again, or update moekit.")


def _has_result(record: RunRecord, known: Mapping[str, Any]) -> bool:
    """Whether what is said of a run is of the types that are written, and is a result."""
    typed = all(isinstance(known[name], dict) for name in ("summary", "mechanisms", "last"))
    typed = typed and isinstance(known["commit"], dict | None) and isinstance(record.minutes, int | float)
    return (
        typed and record.final and isinstance(record.said, str) and (record.state != "done" or known["summary"] != {})
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where a run that diverged has none."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_values(path: Path) -> dict[str, str]:
    """The last value of every column of metrics.csv, as it is written there."""
    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found |= {name: value for name, value in row.items() if name and value}
    except (OSError, ValueError):
        return {}
    return found


def _table(last: Mapping[str, str]) -> str:
    """A metrics.csv of one row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(last))
    writer.writeheader()
    writer.writerow(last)
    return text.getvalue()
