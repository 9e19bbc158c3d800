"""The numbers of finished runs in small files beside the results, so that work on a table goes on elsewhere.

Run folders are large and stay where they were made. What a result asks of them is kept in a file each, which can be
committed: whoever makes the table then, on any machine, makes only the runs that nobody has made.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.ablation.plan import Job
from moekit.ablation.processes import RunRecord, runs_held, write_record
from moekit.atomic import one_flush, write_json, write_text
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

    Where an evaluation of a trained model is kept for the first time, the numbers of that very model are kept with it,
    in the place of those of an earlier training on another machine: claims compare the two.

    Args:
        jobs: of a table.
        runs: the folder of all run folders.
        kept: the folder of the small files.
    """
    own = [job for job in jobs if not job.trains and not _path(job, kept).is_file()]
    evaluated = {other.digest for job in own if RunRecord.of(job.folder(runs)).final for other in job.needs}
    for job in jobs:
        record, path = RunRecord.of(job.folder(runs)), _path(job, kept)
        if record.final and (job.digest in evaluated or not path.is_file()):
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

    A run whose trained model another job of the table needs is left out, unless that one is kept too: its numbers alone
    do not replace its checkpoint. Where nothing but numbers lies there, put for another table, they are taken away, so
    that it is made. The folder of the runs is held where there is something to do.

    Raises:
        InUseError: another process holds that folder.
        UserError: a file is damaged, of a later version, or has the numbers of another run.
    """
    if not any(_to_do(jobs, runs, kept)):
        return 0
    with runs_held(runs):
        found, bare = _to_do(jobs, runs, kept)  # what was made until the folder was held stays
        for job in bare:
            shutil.rmtree(job.folder(runs))
        with one_flush():
            records = [(job.folder(runs), _put(job, runs, _path(job, kept))) for job in found]
        with one_flush():  # what says that a run is done comes behind its numbers; damaged, it says nothing
            for folder, record in records:
                write_record(folder, record)
    return len(found)


def _to_do(jobs: Sequence[Job], runs: Path, kept: Path) -> tuple[list[Job], list[Job]]:
    """Jobs without a result here that have a kept one to put; and those of whose model there are but numbers here."""
    missing = [job for job in jobs if not RunRecord.of(job.folder(runs)).final]
    made = {job.digest: job for job in missing if not _path(job, kept).is_file()}
    waiting = list(made.values())
    while waiting:  # a model that is to be made needs those that it goes on with
        for job in waiting.pop().needs:
            has_model = RunRecord.of(job.folder(runs)).final and not _is_bare(job.folder(runs))
            if not has_model and job.digest not in made:
                made[job.digest] = job
                waiting.append(job)
    put = [job for job in missing if job.digest not in made]
    return put, [job for job in made.values() if _is_bare(job.folder(runs))]


def _is_bare(folder: Path) -> bool:
    """Whether a folder is one that `_put` has written: the environment.json of a run says more than its commit."""
    return set(_read(folder / _ENVIRONMENT)) == {"commit"}


def _put(job: Job, runs: Path, path: Path) -> RunRecord:
    """Write a run folder of what its kept file has; returns what is to be written beside it."""
    known = _checked(path, job)
    folder = job.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((SUMMARY, known["summary"]), (MECHANISMS, known["mechanisms"])):
        if values:
            write_json(folder / name, values)
    write_text(folder / _METRICS, _table(known["last"]))
    write_json(folder / _ENVIRONMENT, {"commit": known["commit"]})
    return RunRecord(**known["record"])


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
