"""What a run knows: recall of facts by frequency, and how far its losses are above those of a model that knows all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from moekit.report import wording
from moekit.report.plots import Shares
from moekit.report.run_folder import RunFolder
from moekit.report.view import Figure, PageSection, Table, Tile, caption, heading
from moekit.runs.record import FloorRecord, RecallOf, RecallRecord, Record

_T = TypeVar("_T", bound=Record)


def floors(run: RunFolder) -> dict[tuple[str, str], FloorRecord]:
    """By task and split what the best of models would lose, where that is known."""
    return {(found.task, found.split): found for found in _records(run, "floors", FloorRecord)}


def above_floor(run: RunFolder, task: str, loss: float | None, split: str = "test") -> float | None:
    """How many nats a loss of a task is above that of a model that knows every fact; None where nobody knows."""
    floor = floors(run).get((task, split))
    return None if floor is None or loss is None else loss - floor.knowing


def recalls(run: RunFolder) -> list[RecallRecord]:
    """What was asked of each task."""
    return [found for found in _records(run, "recall", RecallRecord) if found.kinds]


def recall_table(run: RunFolder) -> Table:
    """Recall by task and kind of question, with chance beside it."""
    found = recalls(run)
    languages = list(dict.fromkeys(code for record in found for of in record.kinds for code in of.languages))
    rows = []
    for record in found:
        named = f"{run.task(record.task).title}: " if len(found) > 1 else ""
        for of in record.kinds:
            shares = [of.recall, *(of.languages.get(code) for code in (languages if len(languages) > 1 else ()))]
            rows.append(
                (
                    f"{named}{of.kind}",
                    *map(wording.percent, shares),
                    wording.percent(record.chance),
                    f"{of.questions:,}",
                )
            )
    spoken = languages if len(languages) > 1 else []
    return Table(["facts", "recall", *spoken, "chance", "questions"], rows, "Recall of facts")


def recall_section(run: RunFolder) -> PageSection | None:
    """Recall by decile of frequency, a figure for each task; None where nothing was asked."""
    found = recalls(run)
    if not found:
        return None
    left = [_figure(run, record, f": {run.task(record.task).title}" if len(found) > 1 else "") for record in found]
    table = Figure(*caption("recall_table"), table=recall_table(run))
    return PageSection(*heading("recall"), cells=[left, [table]])


def recall_tiles(run: RunFolder) -> list[Tile]:
    """Recall of known facts by the first task that was asked."""
    for record in recalls(run):
        for of in record.kinds[:1]:
            return [
                Tile(
                    "Recall",
                    wording.percent(of.recall),
                    f"of {of.kind} facts, {wording.percent(record.chance)} by chance",
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


def recall_rows(runs: Sequence[RunFolder]) -> dict[str, list[float | None]]:
    """By title, such as ``Next word: known``, the recall of every run; chance where any run was asked."""
    rows: dict[str, list[float | None]] = {}
    for number, run in enumerate(runs):
        for record in recalls(run):
            title = run.task(record.task).title
            shares: Mapping[str, float] = {of.kind: of.recall for of in record.kinds} | {"chance": record.chance}
            for kind, share in shares.items():
                rows.setdefault(f"{title}: {kind}", [None] * len(runs))[number] = share
    return rows


def _figure(run: RunFolder, record: RecallRecord, task: str) -> Figure:
    lines = {of.kind: _by_decile(of) for of in record.kinds}
    deciles = max(map(len, lines.values()))
    names = [f"{number}" for number in range(1, deciles + 1)]
    chart = Shares(
        names, lines, f"Recall by decile of frequency{task}", {"chance": record.chance}, "decile of frequency"
    )
    rows = [(name, *(wording.percent(_known(line, i)) for line in lines.values())) for i, name in enumerate(names)]
    return Figure(
        *caption("recall", task=task), chart, numbers=Table(["decile", *lines], rows), name=f"recall/{record.task}"
    )


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
