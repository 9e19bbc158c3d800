"""Scores of the answers that the test of a run wrote, for tasks other than translation: the run's record names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moekit.report import page, wording
from moekit.report.run_folder import RunFolder, Scores, dig, names_in

_SHOWN_ELSEWHERE = ("bleu", "chrf")


@dataclass(frozen=True)
class AnswerScores:
    """What the answers to one task scored.

    Attributes:
        title: of the task.
        explanation: of the task, one sentence.
        scores: by label, as "Exact match".
    """

    title: str
    explanation: str
    scores: Mapping[str, Scores]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row for each direction, and one of averages where there are several: its name, then every score."""
        names = list(dict.fromkeys(d for found in self.scores.values() for d in found.directions))
        rows = [(d, *(wording.fixed(x.directions.get(d)) for x in self.scores.values())) for d in names]
        return (
            rows if len(names) == 1 else [*rows, ("average", *(wording.fixed(x.average) for x in self.scores.values()))]
        )

    @property
    def averages(self) -> list[tuple[str, str]]:
        """(label, average) of every score."""
        return [(label, wording.fixed(found.average)) for label, found in self.scores.items()]


def answers(run: RunFolder) -> tuple[AnswerScores, ...]:
    """Scores of the tasks whose written answers were tested; translation's have places of their own."""
    tested = []
    for task in names_in(dig(run.summary, "tasks")):
        record = dig(run.summary, "tasks", task)
        labels = {name: str(dig(record, "scores", name)) for name in names_in(dig(record, "scores"))}
        scores = {label: run.scores(name) for name, label in labels.items() if name not in _SHOWN_ELSEWHERE}
        if any(found.average is not None for found in scores.values()):
            tested.append(
                AnswerScores(str(dig(record, "title") or task), str(dig(record, "explanation") or ""), scores)
            )
    return tuple(tested)


def section(run: RunFolder) -> str:
    """Section of the page; "" where no such answers were tested."""
    figures = [
        page.figure(
            found.title,
            f"{found.explanation} In percent, of held-out examples.",
            "",
            page.table(["direction", *found.scores], found.rows),
        )
        for found in answers(run)
    ]
    return (
        page.section("answers", "Answers", "What was written, against what was expected.", "".join(figures))
        if figures
        else ""
    )
