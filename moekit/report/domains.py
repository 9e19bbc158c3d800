"""Losses on text of other domains: a section of a run's page, and a table for each way to read it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from moekit.report import wording
from moekit.report.run_folder import RunFolder
from moekit.report.view import Figure, PageSection, Table, heading
from moekit.runs.record import DomainRecord

_TITLE = "Text of other domains"


def domain_table(run: RunFolder) -> Table:
    """Loss by domain and task, how far it is above that of the test, and above the floor where that is known."""
    found = _records(run)
    floored = any(of.knowing is not None for of in found)
    rows = [
        (
            _named(run, of, len({each.task for each in found})),
            wording.significant(of.loss),
            wording.fixed(of.above_test, 3),
            *([wording.fixed(None if of.knowing is None else of.loss - of.knowing, 3)] if floored else []),
            f"{of.sentences:,}",
        )
        for of in found
    ]
    headers = ["domain", "loss", "above the test", *(["above floor"] if floored else []), "sentences"]
    return Table(headers, rows, _TITLE)


def domain_section(run: RunFolder) -> PageSection | None:
    """The table; None where no other text was asked for."""
    table = domain_table(run)
    return PageSection(*heading("domains"), cells=[[Figure(_TITLE, table=table)]]) if table.rows else None


def compared_domains(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """By domain and task the loss of every run."""
    rows: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        found = _records(run)
        for of in found:
            name = _named(run, of, len({each.task for each in found}))
            rows.setdefault(name, [wording.MISSING] * len(runs))[number] = wording.significant(of.loss)
    return rows


def _named(run: RunFolder, of: DomainRecord, tasks: int) -> str:
    return f"{of.name}: {run.task(of.task).title}" if tasks > 1 else of.name


def _records(run: RunFolder) -> list[DomainRecord]:
    given, found = run.summary.get("domains"), []
    for entry in given if isinstance(given, list) else []:
        with contextlib.suppress(ValueError):
            found.append(DomainRecord.from_json(entry, []))
    return found
