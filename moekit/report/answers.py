"""Scores of the answers that the test of a run wrote, for tasks other than translation: the run's record names them."""

from __future__ import annotations

from moekit.report import wording
from moekit.report.run_folder import DirectionScores, RunFolder, dig, names_in
from moekit.report.view import Figure, PageSection, Table, Tile, heading

_SHOWN_ELSEWHERE = ("bleu", "chrf")


def answers(run: RunFolder) -> dict[str, dict[str, DirectionScores]]:
    """Scores by label, as "Exact match", of each task whose written answers were tested, by its name.

    Translation's have places of their own.
    """
    tested = {}
    for task in names_in(dig(run.summary, "tasks")):
        labels = dig(run.summary, "tasks", task, "scores")
        scores = {str(labels[n]): run.scores(n) for n in names_in(labels) if n not in _SHOWN_ELSEWHERE}
        if any(found.average is not None for found in scores.values()):
            tested[task] = scores
    return tested


def answer_tables(run: RunFolder) -> list[Table]:
    """A table for each such task: a row for each direction, and one of averages where there are several."""
    tables = []
    for task, scores in answers(run).items():
        names = list(dict.fromkeys(d for found in scores.values() for d in found.directions))
        rows = [(d, *(wording.fixed(found.directions.get(d)) for found in scores.values())) for d in names]
        if len(names) != 1:
            rows.append(("average", *(wording.fixed(found.average) for found in scores.values())))
        signatures = {label: found.signature for label, found in scores.items() if found.signature}
        tables.append(Table(["direction", *scores], rows, run.task(task).title, signatures))
    return tables


def answer_tiles(run: RunFolder) -> list[Tile]:
    """The first two scores of each such task as headline numbers."""
    return [
        Tile(label, wording.fixed(found.average), run.task(task).title.lower())
        for task, scores in answers(run).items()
        for label, found in list(scores.items())[:2]
    ]


def answer_section(run: RunFolder) -> PageSection | None:
    """Section of the page; None where no such answers were tested."""
    explained = [run.task(task).explanation for task in answers(run)]
    cells = [
        [Figure(table.title, f"{explanation} In percent, of held-out examples.", table=table)]
        for table, explanation in zip(answer_tables(run), explained, strict=True)
    ]
    return PageSection(*heading("answers"), cells=cells) if cells else None
