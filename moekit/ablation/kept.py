"""The numbers of finished runs in small files beside the results, so that work on a table goes on elsewhere.

Run folders are large and stay where they were made. What a result asks of them is kept in a file each, which can be
committed: whoever makes the table then, on any machine, makes only the runs that nobody has made.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moekit.ablation.plan import Job
from moekit.ablation.processes import RunRecord, runs_held, write_record
from moekit.atomic import one_flush, write_json, write_text
from moekit.errors import UserError
from moekit.runs.run import MECHANISMS, SUMMARY, Run
from moekit.stored import parse_json

VERSION = 1
_ENVIRONMENT, _METRICS = "environment.json", "metrics.csv"
_RUN = "run"
"""The name of the run, which that of the file begins with; not there in the first files."""
_OF = "of"
"""Of an evaluation: which numbers its models came to, as digests by their digests; not there in the first files."""
_FILE = "kept"
"""In the environment of a folder of numbers alone: the digest of the file that they are from."""
TEXT = "text"
"""The fingerprint of the user's text, in a kept file and in the environment of a folder of its numbers."""
_TOLD = ("summary", "mechanisms", "last", "commit")


def keep(jobs: Sequence[Job], runs: Path, kept: Path) -> None:
    """Keep the numbers of the jobs that have ended with a result here, unless they are kept already.

    Where an evaluation of a trained model is kept, the numbers of that very model are kept with it, in the place of
    those of an earlier training on another machine: claims compare the two.

    Args:
        jobs: of a table.
        runs: the folder of all run folders.
        kept: the folder of the small files.
    """
    ended = [(job, record) for job in jobs if (record := RunRecord.of(job.folder(runs))).final]
    own = [job for job, _ in ended if not job.trains and _is_new(job, runs, kept)]
    evaluated = {other.digest for job in own for other in job.needs}
    wanted = {job.digest for job in own} | evaluated
    for job, record in ended:
        path = _path(job, kept)
        if job.digest in wanted or not path.is_file():
            folder = job.folder(runs)
            environment = _read(folder / _ENVIRONMENT)
            found = {
                "summary": _read(folder / SUMMARY),
                "mechanisms": _read(folder / MECHANISMS),
                "last": _last_values(folder / _METRICS),
                "commit": environment.get("commit"),
                **({} if job.trains else {_OF: _models(job, runs)}),
                **({} if (text := text_of(job, runs)) is None else {TEXT: text}),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": VERSION, _RUN: folder.name, "record": vars(record), **found})


def restore(jobs: Sequence[Job], runs: Path, kept: Path) -> int:
    """Put the numbers of kept runs where a table looks for them; returns of how many.

    A run whose trained model another job of the table needs is left out, unless that one is kept too: its numbers alone
    do not replace its checkpoint. An evaluation is left out where its model is made, or is of another training than the
    one that was evaluated. Numbers of such jobs that lie there, put for another table, are taken away, so that the jobs
    are made. Numbers of a file that has changed since are put anew. The folder of the runs is held where there is
    something to do.

    Raises:
        InUseError: another process holds that folder.
        UserError: a file is damaged, of a later version, or has the numbers of another run.
    """
    if not any(_to_do(jobs, runs, kept)):
        return 0
    with runs_held(runs):
        found, gone = _to_do(jobs, runs, kept)  # what was made until the folder was held stays
        for job in gone:
            shutil.rmtree(job.folder(runs))
        with one_flush():
            records = [(job.folder(runs), _put(job, runs, _path(job, kept))) for job in found]
        with one_flush():  # what says that a run is done comes behind its numbers; damaged, it says nothing
            for folder, record in records:
                write_record(folder, record)
    return len(found)


def _to_do(jobs: Sequence[Job], runs: Path, kept: Path) -> tuple[list[Job], list[Job]]:
    """Jobs that have a kept result to put; and those that must be made all the same, and whose result here goes.

    A model of which there are but numbers is made where another job needs it. All that evaluates it is made then, too:
    numbers of an earlier training are not those of this model.
    """
    records = {job.digest: RunRecord.of(job.folder(runs)) for job in jobs}
    ended = {digest for digest, record in records.items() if record.final}
    bare = {job.digest for job in jobs if records[job.digest].state == "done" and _is_bare(job.folder(runs))}
    real = ended - bare  # one that diverged has no model to go on with
    unknown = [job for job in jobs if job.digest not in ended and not _path(job, kept).is_file()]
    others = [job for job in jobs if job.digest not in real and _is_of_another(job, runs, kept)]
    made = {job.digest: job for job in (*unknown, *others)}
    waiting = list(made.values())
    while waiting:
        job = waiting.pop()
        models = [other for other in job.needs if other.digest not in real]
        for other in (*models, *(other for other in jobs if not other.trains and job in other.needs)):
            if other.digest not in made:
                made[other.digest] = other
                waiting.append(other)
    kept_here = (job for job in jobs if job.digest not in real | made.keys() and _path(job, kept).is_file())
    put = [job for job in kept_here if not _is_put(job, runs, kept)]
    return put, [job for job in made.values() if job.digest in ended]


def _is_new(job: Job, runs: Path, kept: Path) -> bool:
    """Whether an evaluation that was made here is not kept, or it or its models are kept of another training."""
    known = _known(job, kept)
    if _is_bare(job.folder(runs)) or (known and _OF not in known):
        return not known
    models = _models(job, runs)
    others = {other.digest: _digest(_known(other, kept).get("summary")) for other in job.needs}
    return bool(known.get(_OF) != models or others != models)


def _is_of_another(job: Job, runs: Path, kept: Path) -> bool:
    """Whether a kept evaluation is of another training than the one whose numbers are here, or are kept."""
    said = None if job.trains else _known(job, kept).get(_OF)
    return isinstance(said, dict) and any(_model(other, runs, kept) != said.get(other.digest) for other in job.needs)


def _models(job: Job, runs: Path) -> dict[str, str]:
    """By digest the digest of the numbers of each model that a job evaluates."""
    return {other.digest: _digest(_read(other.folder(runs) / SUMMARY)) for other in job.needs}


def _model(job: Job, runs: Path, kept: Path) -> str:
    """The digest of a model's numbers: those of a training here, else those that are kept."""
    folder, known = job.folder(runs), _known(job, kept)
    here = RunRecord.of(folder).final and (not known or not _is_bare(folder))
    return _digest(_read(folder / SUMMARY) if here else known.get("summary", {}))


def _digest(summary: Any) -> str:
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()[:16]


def _is_bare(folder: Path) -> bool:
    """Whether a folder is one that `_put` has written: the environment.json of a run says more than its commit."""
    said = {*_read(folder / _ENVIRONMENT)}
    return {"commit"} <= said <= {"commit", _FILE, TEXT}


def _is_put(job: Job, runs: Path, kept: Path) -> bool:
    """Whether what is kept of a job lies among the runs as it is."""
    folder = job.folder(runs)
    return RunRecord.of(folder).final and _read(folder / _ENVIRONMENT).get(_FILE) == _digest_of(_path(job, kept))


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _put(job: Job, runs: Path, path: Path) -> RunRecord:
    """Write a run folder of what its kept file has; returns what is to be written beside it."""
    known = _checked(path, job)
    folder = job.folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((SUMMARY, known["summary"]), (MECHANISMS, known["mechanisms"])):
        if values:
            write_json(folder / name, values)
        else:
            (folder / name).unlink(missing_ok=True)
    write_text(folder / _METRICS, _table(known["last"]))
    text = {TEXT: known[TEXT]} if TEXT in known else {}
    write_json(folder / _ENVIRONMENT, {"commit": known["commit"], _FILE: _digest_of(path), **text})
    return RunRecord(**known["record"])


def _known(job: Job, kept: Path) -> dict[str, Any]:
    """What a kept file says, before it is checked; empty where there is none."""
    return _read(_path(job, kept))


def text_of(job: Job, runs: Path) -> str | None:
    """The fingerprint of the user's text that a run was made of; None where it has none, or nobody knows."""
    folder = job.folder(runs)
    if not job.config.data.path:
        return None
    said = _read(folder / _ENVIRONMENT).get(TEXT)
    held_out = None if said is not None else Run(folder).held_out
    return str(said) if said is not None else None if held_out is None else held_out.corpus.fingerprint


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
