"""How well a run knows which forms agree: by kind and language, on its page and beside other runs."""

from __future__ import annotations

import math

from moekit.report import wording
from moekit.report.plots import Dots
from moekit.report.recall import CHANCE, agreements, kinds_table, said
from moekit.report.run_folder import RunFolder
from moekit.report.view import Figure, PageSection, Table, Tile, caption, heading
from moekit.runs.record import RecallRecord

_TITLE = "Agreement"
_CONTROL = "undetermined"
_SEPARATOR = " \u00b7 "


def agreement_table(run: RunFolder) -> Table:
    """The share of right answers by task and kind of agreement, in every language, with chance beside it."""
    return kinds_table(run, agreements(run), ("agreement", "right"), _TITLE)


def agreement_section(run: RunFolder) -> PageSection | None:
    """A mark for each kind in every language, a figure for each task, and the table; None where nothing was asked."""
    found = agreements(run)
    if not found:
        return None
    drawn = [_figure(record, f": {run.task(record.task).title}" if len(found) > 1 else "") for record in found]
    return PageSection(*heading("agreement"), cells=[drawn, [Figure(_TITLE, table=agreement_table(run))]])


def agreement_tiles(run: RunFolder) -> list[Tile]:
    """The share of all that the first task answers right, the control aside."""
    for record in agreements(run)[:1]:
        kinds = [of for of in record.kinds if of.kind != _CONTROL]
        number = sum(of.questions for of in kinds)
        if number:
            share = sum(of.recall * of.questions for of in kinds) / number
            remark = f"of {number:,} pairs of sentences, {wording.percent(record.chance)} by chance"
            return [Tile(_TITLE, wording.percent(share), remark)]
    return []


def agreement_words(run: RunFolder) -> list[str]:
    """Two lines for each task that was asked: the share of right answers by kind; the control, and chance."""
    found = []
    for record in agreements(run):
        shares = {of.kind: f"{said(of)} {wording.percent(of.recall, 0)}" for of in record.kinds}
        control = [shares.pop(_CONTROL)] if _CONTROL in shares else []
        chance = f"{CHANCE} {wording.percent(record.chance, 0)}"
        found += [_SEPARATOR.join(shares.values()), _SEPARATOR.join([*control, chance])]
    return found


def _figure(record: RecallRecord, task: str) -> Figure:
    languages = list(dict.fromkeys(code for of in record.kinds for code in of.languages))
    columns = {said(of): [of.languages.get(code, math.nan) for code in languages] for of in record.kinds}
    description = f"Agreement by language and kind{task}; the numbers are in the table"
    chart = Dots(languages, columns, description, levels={CHANCE: record.chance})
    return Figure(*caption("agreement", task=task), chart, name=f"agreement/{record.task}")
