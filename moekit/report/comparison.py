"""`write_comparison`: several runs side by side, the first one being what the others are measured against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moekit.errors import UserError
from moekit.report import render, wording
from moekit.report.domains import compared_domains
from moekit.report.health import experts_per_token
from moekit.report.pair import pair_section
from moekit.report.plots import Curves, Dots, Line
from moekit.report.predictions import TaskScores, main_task, predictions
from moekit.report.reading import read_run
from moekit.report.recall import (
    above_floor,
    agreements,
    compared_recall,
    floor_lines,
    floor_words,
    kinds_rows,
    recall_heading,
    recalled,
    recalls,
)
from moekit.report.results import costs, routing_words
from moekit.report.run_folder import RunFolder, dig, flat
from moekit.report.significance import significance
from moekit.report.style import CYCLE
from moekit.report.view import Figure, PageSection, Table, Tile, View, caption, heading
from moekit.runs.smoke import WARNING

MAX_RUNS = 8
_UNFOLDED = 20  # rows
_KEPT = ("parameters", "active parameters", "steps", "tokens", "tokens per second", "step time", "work", "time")


def write_comparison(run_dirs: Sequence[Path], out: Path, *, known: Sequence[str] = ()) -> Path:
    """Write a page that compares runs, and the same tables as markdown beside it.

    Args:
        run_dirs: two to eight run folders; differences are against the first.
        out: the HTML file to write; the markdown file has the same name and the suffix ``.md``. A folder (or a name
            without a suffix) gets ``comparison.html`` and ``comparison.md``.
        known: what is known of a run and its dense twin over several seeds, in sentences; see `pair.pair_section`.

    Returns:
        Path of the HTML file.

    Raises:
        UserError: if a folder is not a run folder, or there are fewer than two or more than eight.
    """
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise UserError(f"A comparison takes 2 to {MAX_RUNS} runs: got {len(run_dirs)}.")
    view = comparison_view([read_run(Path(d)) for d in run_dirs], known)
    out = Path(out)
    path = out if out.suffix in (".html", ".htm") else out / "comparison.html"
    render.save(path.with_suffix(".md"), render.markdown(view))
    return render.save(path, render.html(view))


def comparison_view(runs: Sequence[RunFolder], known: Sequence[str] = ()) -> View:
    """Everything that is shown of several runs."""
    names = _names(runs)
    measures, accuracy = _measures(runs), _table("Accuracy", names, _accuracies(runs), "task")
    paired, untested = significance(runs, names) if all(run.translates for run in runs) else ([], [])
    facts = [table for table in (_facts(runs, names), _above_floor(runs, names)) if table.rows]
    agreement = _table("Agreement", names, _percents(kinds_rows(runs, agreements)), "agreement")
    domains = _table("Loss on text of other domains", names, compared_domains(runs), "domain")
    costly = {"Cost": _costs(runs), "Tasks (validation)": _tasks(runs), "Routing": _routing(runs)}
    different = _settings(runs)
    settings = _table("Settings that differ", names, different, "setting")
    pair = pair_section(different, known) if len(runs) == 2 else None
    cost = [_table(title, names, rows) for title, rows in costly.items() if rows]
    measured = [
        *(measure.table(names) for measure in measures),
        *(table for table in (accuracy, *facts, agreement, domains) if table.rows),
    ]
    return View(
        kind="moekit comparison",
        title=" vs ".join(names),
        lead=f"Differences are against the first run, {names[0]}.",
        tiles=[_tile(name, run) for name, run in zip(names, runs, strict=True)],
        sections=[
            *_quality(runs, names, measures, accuracy),
            *_knowledge(runs, names, facts),
            *_section("agreement", agreement),
            *_section("domains", domains),
            *([pair] if pair else []),
            *(
                [PageSection(*heading("paired"), untested, [[Figure(t.title, table=t)] for t in paired])]
                if paired or untested
                else []
            ),
            _progress(runs, names),
            PageSection(*heading("settings"), *_shown(settings)),
            PageSection(*heading("cost"), cells=[[Figure(table.title, table=table)] for table in cost]),
        ],
        notes=[*_warnings(runs), *(pair.notes if pair else [])],
        tables=[*measured, *paired, *([settings] if settings.rows else []), *cost],
        remark=f"In brackets: the difference from {names[0]}." if measures else "",
    )


@dataclass(frozen=True)
class _Measure:
    """A score that runs have in common: one value for each run, in whole (the first row) and by `kind`."""

    title: str
    kind: str
    rows: Mapping[str, Sequence[float | None]]
    say: Callable[[float | None], str]
    signatures: Sequence[str] = ()

    def table(self, names: Sequence[str]) -> Table:
        """Every value, and in brackets how it differs from the first run's where both were computed alike."""
        known = [own for own in self.signatures[:1] if own]
        firsts = [not known or own in ("", *known) for own in self.signatures or names][1:]
        cells = {
            name: [self.say(first), *(self._told(first if s else None, v) for v, s in zip(rest, firsts, strict=True))]
            for name, (first, *rest) in self.rows.items()
        }
        return _table(self.title, names, cells, self.kind)

    def cells(self, names: Sequence[str]) -> list[list[Figure]]:
        """The table, and beside it one mark for each run and direction or language."""
        numbers = [Figure(self.title, table=self.table(names))]
        _, *parts = self.rows
        if not parts:
            return [numbers]
        values = [[math.nan if value is None else value for value in self.rows[part]] for part in parts]
        columns = dict(zip(names, zip(*values, strict=True), strict=True))
        lower = self.kind == "language"
        description = f"{self.title} by {self.kind} and run; the numbers are in the table"
        words = caption("compared", title=self.title, kind=self.kind, side="left" if lower else "right")
        return [[Figure(*words, Dots(parts, columns, description, perplexity=lower))], numbers]

    def _told(self, first: float | None, value: float | None) -> str:
        if value is None or first is None:
            return self.say(value)
        return f"{self.say(value)} ({chr(0x2212) if value < first else '+'}{self.say(abs(value - first))})"


def _measures(runs: Sequence[RunFolder]) -> list[_Measure]:
    """BLEU and chrF of the runs that translate, the perplexity of every task of the others."""
    found = []
    for title in ("BLEU", "chrF"):
        scores = [run.scores(title.lower()) for run in runs]
        rows = {"average": [x.average for x in scores]} | _side_by_side([x.directions for x in scores], best=max)
        found.append(_Measure(title, "direction", rows, wording.fixed, [x.signature for x in scores]))
    for task, predicted in _predictions(runs).items():
        rows = {"all text": [x.perplexity for x in predicted]}
        languages = _side_by_side([x.languages for x in predicted], best=min)
        rows |= languages if len(languages) > 1 else {}  # one language is all text
        found.append(_Measure(f"Perplexity: {_title(runs, task)}", "language", rows, wording.perplexity))
    return [measure for measure in found if any(v is not None for row in measure.rows.values() for v in row)]


def _side_by_side(
    scores: Sequence[Mapping[str, float]], *, best: Callable[[float, float], float]
) -> dict[str, list[float | None]]:
    """By name the value of every run, in the order of the first run that has it."""
    first = {name: value for found in reversed(scores) for name, value in found.items()}
    names = dict.fromkeys(name for found in scores for name in found)
    order = sorted(names, key=lambda name: first[name], reverse=best is max)
    return {name: [found.get(name) for found in scores] for name in order}


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its variant where that tells them apart, else recipe and variant, else the folder."""
    candidates = (
        [r.variant for r in runs],
        [r.name for r in runs],
        [r.path.resolve().name for r in runs],
        [str(r.path) for r in runs],
    )
    numbered = [f"{r.path} ({i})" for i, r in enumerate(runs, start=1)]
    return next((names for names in candidates if all(names) and len(set(names)) == len(runs)), numbered)


def _warnings(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Why the numbers may not be comparable."""
    if tests := [run.path.resolve().name for run in runs if run.smoke]:
        yield f"{', '.join(tests)}: {WARNING}."
    data = {json.dumps(dig(r.summary, "data"), sort_keys=True, default=str) for r in runs if r.summary.get("data")}
    if len(data) > 1:
        yield "These runs used different data, so their scores are not strictly comparable."
    for metric in ("bleu", "chrf"):
        scores = [run.scores(metric) for run in runs]
        if len(signatures := {x.signature for x in scores} - {""}) > 1:
            yield f"The {metric} signatures differ, so no difference is given: {', '.join(sorted(signatures))}."
        if len({x.origin for x in scores if x.average is not None}) > 1:
            yield f"Some {metric} scores are of the test set, others of the last validation."
    texts = [main_task(run) for run in runs if not run.translates]
    if 0 < len(texts) < len(runs):
        yield "Some of these runs translate and others do not: they have no score in common."
    if len({x.task for x in texts if x.task}) > 1:
        yield "The perplexities are of different tasks, so they are not comparable."
    if len({x.origin for x in texts if x.perplexity is not None}) > 1:
        yield "Some perplexities are of the test set, others of the last validation."


def _predictions(runs: Sequence[RunFolder]) -> dict[str, list[TaskScores]]:
    """By task, for each run; empty scores of a run that translates or does not have the task."""
    by_run = [{} if run.translates else {x.task: x for x in predictions(run)} for run in runs]
    tasks = dict.fromkeys(task for found in by_run for task in found)
    return {task: [found.get(task, TaskScores(task)) for found in by_run] for task in tasks}


def _accuracies(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """By title of the task, where a run measured it."""
    rows = {_title(runs, t): [wording.percent(x.accuracy) for x in found] for t, found in _predictions(runs).items()}
    for name in ("majority", "chance"):
        rows |= {
            f"{_title(runs, t)}: {name}": [wording.percent(getattr(x, name)) for x in found]
            for t, found in _predictions(runs).items()
        }
    return {title: rows[title] for title in sorted(rows) if set(rows[title]) != {wording.MISSING}}


def _facts(runs: Sequence[RunFolder], names: Sequence[str]) -> Table:
    """Recall of facts and words by task and kind, and chance."""
    return _table(f"Recall of {recalled(runs)}", names, _percents(kinds_rows(runs, recalls)), recalled(runs))


def _percents(rows: Mapping[str, Sequence[float | None]]) -> dict[str, list[str]]:
    return {title: [wording.percent(share) for share in row] for title, row in rows.items()}


def _section(key: str, table: Table) -> list[PageSection]:
    """A section that is a table; none where it is empty."""
    return [PageSection(*heading(key), cells=[[Figure(table.title, table=table)]])] if table.rows else []


def _above_floor(runs: Sequence[RunFolder], names: Sequence[str]) -> Table:
    """How far the loss of each task is above the floor of its text, nats per prediction."""
    rows = {}
    for task, found in _predictions(runs).items():
        above = [above_floor(run, task, x.loss, x.origin) for run, x in zip(runs, found, strict=True)]
        if any(value is not None for value in above):
            rows[_title(runs, task)] = [wording.fixed(value, 3) for value in above]
    return _table("Loss above the floor", names, rows, "task")


def _knowledge(runs: Sequence[RunFolder], names: Sequence[str], tables: Sequence[Table]) -> list[PageSection]:
    """Recall by frequency with a line for each run, and the tables on it; nothing where nothing was asked."""
    curves = compared_recall(runs, names)
    cells = [*([curves] if curves else []), *([Figure(table.title, table=table)] for table in tables)]
    return [PageSection(*recall_heading(runs), cells=cells)] if cells else []


def _settings(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """By dotted name the settings that are not the same in all runs; a dash where a run has none of that name."""
    columns = [flat(run.settings) for run in runs]
    rows = {key: [c.get(key, wording.MISSING) for c in columns] for key in dict.fromkeys(k for c in columns for k in c)}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _shown(settings: Table) -> tuple[list[str], list[list[Figure]]]:
    """Notes and cells of the section on settings; many rows lie behind a fold."""
    if not settings.rows:
        return ["All runs have the same settings, or do not say."], []
    many = len(settings.rows) > _UNFOLDED
    count = wording.count(len(settings.rows), "setting")
    return [], [[Figure(count, table=None if many else settings, numbers=settings if many else None, wide=True)]]


def _title(runs: Sequence[RunFolder], task: str) -> str:
    """What the first run that names the task calls it."""
    return next((run for run in runs if dig(run.summary, "tasks", task)), runs[0]).task(task).title


def _costs(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    columns = [costs(run) for run in runs]
    rows = {key: [column[key] for column in columns] for key in _KEPT}
    return {key: row for key, row in rows.items() if set(row) != {wording.MISSING}}


def _tasks(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    rows = {}
    for quantity, say in (("loss", wording.significant), ("perplexity", wording.perplexity)):
        values = [run.by_task(quantity) for run in runs]
        for task in dict.fromkeys(t for v in values for t in v):
            rows[f"{_title(runs, task)} {quantity}"] = [say(v.get(task)) for v in values]
    return rows


def _routing(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    columns = [routing_words(run) for run in runs]
    rows = {key: ["dense" if r.dense else c[key] for r, c in zip(runs, columns, strict=True)] for key in columns[0]}
    if all(experts_per_token(run) is None for run in runs):
        del rows["experts per token"]
    return rows


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]], corner: str = "") -> Table:
    return Table([corner, *names], [(name, *values) for name, values in rows.items()], title)


def _tile(name: str, run: RunFolder) -> Tile:
    cost = costs(run)
    remark = f"{cost['active parameters']} active parameters, {cost['tokens per second']} tokens/s"
    if run.translates:
        return Tile(f"BLEU, {name}", wording.fixed(run.scores("bleu").average), remark)
    return Tile(f"Perplexity, {name}", wording.perplexity(main_task(run).perplexity), remark)


def _quality(
    runs: Sequence[RunFolder], names: Sequence[str], measures: Sequence[_Measure], accuracy: Table
) -> list[PageSection]:
    """One section for the runs that translate, one for those that do not."""
    sections = []
    for translate, key, kind, lacking in (
        (True, "compared_translation", "direction", "None of these runs has measured BLEU."),
        (False, "compared_prediction", "language", "None of these runs has measured a perplexity."),
    ):
        if all(run.translates != translate for run in runs):
            continue
        cells = [cell for measure in measures if measure.kind == kind for cell in measure.cells(names)]
        if not translate and accuracy.rows:
            cells.append([Figure(accuracy.title, table=accuracy)])
        sections.append(PageSection(*heading(key), [] if cells else [lacking], cells))
    return sections


def _progress(runs: Sequence[RunFolder], names: Sequence[str]) -> PageSection:
    bleu = any(run.translates for run in runs)
    better = "sentences: higher BLEU and lower loss are better" if bleu else "text: lower loss is better"

    def curves(column: str, description: str, *, from_zero: bool = False) -> Curves:
        logged = [(i, run.metrics[column]) for i, run in enumerate(runs) if column in run.metrics]
        lines = [Line(names[i], series, CYCLE[i % len(CYCLE)], "points") for i, series in logged]
        return Curves(lines, description, start_at_zero=from_zero, height=2.3)

    figures = []
    if any("valid/bleu/average" in run.metrics for run in runs):
        chart = curves("valid/bleu/average", "Validation BLEU of every run over steps", from_zero=True)
        figures.append(Figure("BLEU", "Average over all directions.", chart=chart))
    first = {task: run for run in reversed(runs) for task in run.by_column("valid", "loss")}
    for task in dict.fromkeys(task for run in runs for task in run.by_column("valid", "loss")):
        named = first[task].task(task)
        chart = curves(f"valid/{task}/loss", f"{named.title}: validation loss of every run over steps")
        levels = floor_lines(runs, task, [line.series for line in chart.lines])
        words = f"{named.explanation} Validation loss.{f' {floor_words()}' if levels else ''}"
        figures.append(Figure(named.title, words, chart=replace(chart, lines=[*chart.lines, *levels])))
    notes = [] if figures else ["No validation loss was logged."]
    return PageSection(*heading("progress", better=better), notes, [[figure] for figure in figures])
