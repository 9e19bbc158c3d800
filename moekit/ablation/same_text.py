"""The runs of a table are of one text: a path that a table names may lead to another one by now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moekit.ablation.kept import text_of
from moekit.ablation.plan import Job
from moekit.ablation.processes import RunRecord
from moekit.errors import UserError
from moekit.runs.plain import plain
from moekit.runs.settings import DataConfig


def require_same_text(jobs: Sequence[Job], runs: Path) -> None:
    """Make sure that the user's text is what the finished jobs were made of.

    Runs are named by their settings, of which a path is one and its text is none. Where there is no text at the path
    nothing can be made of it, and what has been made counts.

    Args:
        jobs: of a table.
        runs: the folder of all run folders.

    Raises:
        UserError: it is another text; the path and a run are named.
    """
    now: dict[str, str | None] = {}
    for job in jobs:
        data = job.config.data
        if not data.path or RunRecord.of(job.folder(runs)).state != "done" or (then := text_of(job, runs)) is None:
            continue
        which = json.dumps([data.path, plain(data.which_text())], sort_keys=True, default=str)
        if which not in now:
            now[which] = _fingerprint(data)
        if now[which] not in (None, then):
            raise UserError(
                f"the text of data.path {data.path} must be the one that the runs of the table were made of: it has "
                f"changed since {job.label} was made, in {job.folder(runs)}. Put it back as it was, or give the new "
                "text another path; or begin anew with other folders, --runs and --out."
            )


def _fingerprint(data: DataConfig) -> str | None:
    try:
        return data.open().fingerprint()
    except UserError:  # which a run that needs it says
        return None
