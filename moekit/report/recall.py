"""What a run knows: recall of facts or words by frequency, and how far its losses are above the least possible."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from moekit.report import wording
from moekit.report.plots import Line, Shares
from moekit.report.run_folder import RunFolder, Series
from moekit.report.view import Figure, PageSection, Table, Tile, caption, heading, texts
from moekit.runs.record import FloorRecord, RecallOf, RecallRecord
from moekit.runs.stored_record import Record

_T = TypeVar("_T", bound=Record)
_WORDS, _AGREEMENT = "words", "agreement"
CHANCE = "chance"


def floors(run: RunFolder) -> dict[tuple[str, str], FloorRecord]:
    """By task and split what the best of models would lose, where that is known."""
    return {(found.task, found.split): found for found in _records(run, "floors", FloorRecord)}


def above_floor(run: RunFolder, task: str, loss: float | None, split: str = "test") -> float | None:
    """How many nats a loss of a task is above that of a model that knows every fact; None where nobody knows."""
    floor = floors(run).get((task, split))
    return None if floor is None or loss is None else loss - floor.knowing


def floor_lines(runs: Sequence[RunFolder], task: str, drawn: Sequence[Series]) -> list[Line]:
    """Dotted lines at the floors of validation, as long as what is drawn; none where the runs have others, or none."""
    known = {floors(run).get((task, "valid")) for run in runs}
    steps = np.concatenate([series.finite.step for series in drawn] or [np.zeros(0)])
    if len(known) != 1 or None in known or not len(steps):
        return []
    floor, ends = next(iter(known)), np.array([steps.min(), steps.max()])
    assert floor is not None, "None is not in it"
    return [
        Line("guessing facts", Series(ends, np.full(2, floor.guessing)), "muted", "level"),
        Line("floor", Series(ends, np.full(2, floor.knowing)), "green", "level"),
    ]


def floor_words() -> str:
    """What these lines are."""
    return texts()["words"]["floor"][0]


def recalls(run: RunFolder) -> list[RecallRecord]:
    """What was asked of each task of facts or words."""
    return [found for found in _records(run, "recall", RecallRecord) if found.kinds and found.about != _AGREEMENT]


def agreements(run: RunFolder) -> list[RecallRecord]:
    """What was asked of each task of agreement."""
    return [found for found in _records(run, "recall", RecallRecord) if found.kinds and found.about == _AGREEMENT]


def recall_table(run: RunFolder) -> Table:
    """Recall by task and kind of question, with chance beside it."""
    about = recalled([run])
    return kinds_table(run, recalls(run), (about, "recall"), f"Recall of {about}")


def kinds_table(run: RunFolder, found: Sequence[RecallRecord], headers: tuple[str, str], title: str) -> Table:
    """What was answered right by task and kind of question, of all and in every language, with chance beside it.

    Args:
        run: the run that was asked.
        found: the answers to show.
        headers: the headers of two columns, that of the kinds and that of the shares.
        title: the title of the table.
    """
    languages = list(dict.fromkeys(code for record in found for of in record.kinds for code in of.languages))
    spoken = languages if len(languages) > 1 else []
    rows = []
    for record in found:
        named = f"{run.task(record.task).title}: " if len(found) > 1 else ""
        for of in record.kinds:
            shares = [of.recall, *map(of.languages.get, spoken), record.chance]
            rows.append((f"{named}{said(of)}", *map(wording.percent, shares), f"{of.questions:,}"))
    return Table([*headers, *spoken, CHANCE, "questions"], rows, title)


def recall_section(run: RunFolder) -> PageSection | None:
    """Recall by decile of frequency, a figure for each task; None where nothing was asked."""
    found = recalls(run)
    if not found:
        return None
    left = [_figure(run, record, f": {run.task(record.task).title}" if len(found) > 1 else "") for record in found]
    words = caption("recall_words_table") if recalled([run]) == _WORDS else caption("recall_table")
    return PageSection(*recall_heading([run]), cells=[left, [Figure(*words, table=recall_table(run))]])


def recalled(runs: Sequence[RunFolder]) -> str:
    """What the runs were asked for: "facts", "words" or both, in words."""
    return " and ".join(sorted({record.about for run in runs for record in recalls(run)})) or "facts"


def recall_heading(runs: Sequence[RunFolder]) -> tuple[str, str, str, str]:
    """Anchor, link, title and lead of the section on what runs were asked for."""
    return heading("recall_words") if recalled(runs) == _WORDS else heading("recall")


def recall_tiles(run: RunFolder) -> list[Tile]:
    """Recall of what is known by the first task that was asked."""
    for record in recalls(run):
        for of in record.kinds[:1]:
            return [
                Tile(
                    "Recall",
                    wording.percent(of.recall),
                    f"of {of.kind} {record.about}, {wording.percent(record.chance)} by chance",
                )
            ]
    return []


def recall_words(run: RunFolder) -> list[str]:
    """A line for each task that was asked: recall by kind, and chance."""
    return [
        " \u00b7 ".join(
            [
                *(f"{of.kind} {wording.percent(of.recall)}" for of in record.kinds),
                f"chance {wording.percent(record.chance)}",
            ]
        )
        for record in recalls(run)
    ]


def kinds_rows(
    runs: Sequence[RunFolder], asked: Callable[[RunFolder], list[RecallRecord]]
) -> dict[str, list[float | None]]:
    """By title, such as ``Next word: known``, the share of every run; chance where any run was asked.

    Args:
        runs: the runs, each of them a column.
        asked: the function that finds what of a run is compared: `recalls` or `agreements`.
    """
    rows: dict[str, list[float | None]] = {}
    for number, run in enumerate(runs):
        for record in asked(run):
            title = run.task(record.task).title
            shares: Mapping[str, float] = {said(of): of.recall for of in record.kinds} | {CHANCE: record.chance}
            for kind, share in shares.items():
                rows.setdefault(f"{title}: {kind}", [None] * len(runs))[number] = share
    return rows


def said(of: RecallOf) -> str:
    """A kind of question in words."""
    return of.kind.replace("_", " ")


def compared_recall(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Figure]:
    """Recall of what is known by decile of frequency, a figure for each task with a line for each run asked."""
    found: dict[str, tuple[str, RecallRecord, dict[str, list[float]]]] = {}
    for name, run in zip(names, runs, strict=True):
        for record in recalls(run):
            first = record.kinds[0]
            _, _, lines = found.setdefault(record.task, (run.task(record.task).title, record, {}))
            lines[name] = _by_decile(first)
    several = len(found) > 1
    return [_by_frequency(lines, record, f": {title}" if several else "") for title, record, lines in found.values()]


def _figure(run: RunFolder, record: RecallRecord, task: str) -> Figure:
    lines = {of.kind: _by_decile(of) for of in record.kinds}
    return _by_frequency(lines, record, task)


def _by_frequency(lines: Mapping[str, Sequence[float]], record: RecallRecord, task: str) -> Figure:
    """Recall by decile of what was asked in `record`, a line for each name."""
    deciles = max(map(len, lines.values()))
    names = [f"{number}" for number in range(1, deciles + 1)]
    chart = Shares(
        names, lines, f"Recall by decile of frequency{task}", {"chance": record.chance}, "decile of frequency"
    )
    rows = [(name, *(wording.percent(_known(line, i)) for line in lines.values())) for i, name in enumerate(names)]
    numbers = Table(["decile", *lines], rows)
    words = caption("recall_words", task=task) if record.about == _WORDS else caption("recall", task=task)
    return Figure(*words, chart, numbers=numbers, name=f"recall/{record.task}")


def _by_decile(of: RecallOf) -> list[float]:
    """Float[deciles], NaN where nothing was asked; of facts without a frequency everywhere the same."""
    if all(share is None for share in of.deciles):
        return [of.recall] * max(1, len(of.deciles))
    return [math.nan if share is None else share for share in of.deciles]


def _known(line: Sequence[float], place: int) -> float | None:
    return line[place] if place < len(line) else None


def _records(run: RunFolder, key: str, kind: type[_T]) -> list[_T]:
    given, found = run.summary.get(key), []
    for entry in given if isinstance(given, list) else []:
        with contextlib.suppress(ValueError):
            found.append(kind.from_json(entry, []))
    return found
