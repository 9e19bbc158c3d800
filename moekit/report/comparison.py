"""`write_comparison`: several runs side by side, the first one being what the others are measured against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moekit.errors import UserError
from moekit.report import render, wording
from moekit.report.health import dropped, experts_per_token, layer_health
from moekit.report.plots import Curves, Dots, Line
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
from moekit.report.results import costs
from moekit.report.run_folder import RunFolder, dig, number, read_run
from moekit.report.style import CYCLE
from moekit.report.view import Figure, Section, Table, Tile, View, caption, heading

MAX_RUNS = 8
_KEPT = ("parameters", "active parameters", "steps", "tokens", "tokens per second", "time")


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs, and the same tables as markdown beside it.

    Args:
        run_dirs: two to eight run folders; differences are against the first.
        out: the HTML file to write; the markdown file has the same name and the suffix ``.md``. A folder (or a name
            without a suffix) gets ``comparison.html`` and ``comparison.md``.

    Returns:
        Path of the HTML file.

    Raises:
        UserError: if a folder is not a run folder, or there are fewer than two or more than eight.
    """
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise UserError(f"A comparison takes 2 to {MAX_RUNS} runs: got {len(run_dirs)}.")
    view = comparison_view([read_run(Path(d)) for d in run_dirs])
    out = Path(out)
    path = out if out.suffix in (".html", ".htm") else out / "comparison.html"
    render.save(path.with_suffix(".md"), render.markdown(view))
    return render.save(path, render.html(view))


def comparison_view(runs: Sequence[RunFolder]) -> View:
    """Everything that is shown of several runs."""
    names = _names(runs)
    translate = [run.translates for run in runs]
    bleu, chrf = (_scores(runs, metric) for metric in ("bleu", "chrf"))
    scores = [
        _differences(title, "direction", names, rows, wording.fixed) for title, rows in (("BLEU", bleu), ("chrF", chrf))
    ]
    predicted = _predictions(runs)
    perplexities = {task: _perplexity(found) for task, found in predicted.items()}
    perplexities = {task: rows for task, rows in perplexities.items() if rows}
    languages = {
        task: _differences(
            f"Perplexity: {_title(runs, task)}" if len(perplexities) > 1 else "Perplexity",
            "language",
            names,
            rows,
            wording.perplexity,
        )
        for task, rows in perplexities.items()
    }
    accuracies = {task: [wording.percent(x.accuracy) for x in found] for task, found in predicted.items()}
    accuracies = {task: row for task, row in accuracies.items() if set(row) != {wording.MISSING}}
    accuracy = _table("Accuracy", names, {_title(runs, task): row for task, row in accuracies.items()}, "task")
    cost = [
        _table("Cost", names, _costs(runs)),
        _table("Tasks (validation)", names, _tasks(runs)),
        _table("Routing", names, _routing(runs)),
    ]
    sections = [_quality(names, bleu, *scores)] if any(translate) else []
    sections += [_held_out(names, perplexities, languages, accuracies)] if not all(translate) else []
    cells = [[Figure(table.title, table=table)] for table in cost if table.rows]
    measured = [table for table in (*scores, *languages.values(), accuracy) if table.rows]
    return View(
        kind="moekit comparison",
        title=" vs ".join(names),
        lead=f"Differences are against the first run, {names[0]}.",
        tiles=[_tile(name, run) for name, run in zip(names, runs, strict=True)],
        sections=[*sections, _progress(runs, names), Section(*heading("cost"), cells=cells)],
        notes=_warnings(runs),
        tables=[*measured, *(table for table in cost if table.rows)],
        remark=f"In brackets: the difference from {names[0]}." if measured else "",
    )


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


def _warnings(runs: Sequence[RunFolder]) -> list[str]:
    """Why the numbers may not be comparable."""
    found = []
    data = {json.dumps(dig(r.summary, "data"), sort_keys=True, default=str) for r in runs if r.summary.get("data")}
    if len(data) > 1:
        found.append("These runs used different data, so their scores are not strictly comparable.")
    for metric in ("bleu", "chrf"):
        scores = [run.scores(metric) for run in runs]
        if len(signatures := {x.signature for x in scores} - {""}) > 1:
            found.append(f"The {metric} signatures differ: {', '.join(sorted(signatures))}.")
        if len({x.origin for x in scores if x.average is not None}) > 1:
            found.append(f"Some {metric} scores are of the test set, others of the last validation.")
    texts = [main_task(run) for run in runs if not run.translates]
    if 0 < len(texts) < len(runs):
        found.append("Some of these runs translate and others do not: they have no score in common.")
    if len({x.task for x in texts if x.task}) > 1:
        found.append("The perplexities are of different tasks, so they are not comparable.")
    if len({x.origin for x in texts if x.perplexity is not None}) > 1:
        found.append("Some perplexities are of the test set, others of the last validation.")
    return found


_Rows = Mapping[str, Sequence[float | None]]


def _scores(runs: Sequence[RunFolder], metric: str) -> _Rows:
    scores = [run.scores(metric) for run in runs]
    first = {d: v for x in reversed(scores) for d, v in x.directions.items()}
    directions = sorted(dict.fromkeys(d for x in scores for d in x.directions), key=lambda d: -first[d])
    found = {"average": [x.average for x in scores]} | {d: [x.directions.get(d) for x in scores] for d in directions}
    return found if any(v is not None for row in found.values() for v in row) else {}


def _predictions(runs: Sequence[RunFolder]) -> dict[str, list[TaskScores]]:
    """By task, for each run; empty scores of a run that translates or does not have the task."""
    by_run = [{} if run.translates else {x.task: x for x in predictions(run)} for run in runs]
    tasks = dict.fromkeys(task for found in by_run for task in found)
    return {task: [found.get(task, TaskScores(task)) for found in by_run] for task in tasks}


def _title(runs: Sequence[RunFolder], task: str) -> str:
    """What the first run that names the task calls it."""
    return next((run for run in runs if dig(run.summary, "tasks", task)), runs[0]).task(task).title


def _perplexity(scores: Sequence[TaskScores]) -> _Rows:
    """Of all text and of every language; nothing where no run measured it."""
    if all(x.perplexity is None for x in scores):
        return {}
    languages = dict.fromkeys(name for x in scores for name in languages_by_perplexity(x))
    rows = {name: [x.languages.get(name) for x in scores] for name in languages}
    return {"all text": [x.perplexity for x in scores]} | (rows if len(rows) > 1 else {})  # one language is all text


def _costs(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    columns = [costs(run) for run in runs]
    return {key: [column[key] for column in columns] for key in _KEPT}


def _tasks(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    rows = {}
    for quantity, say in (("loss", wording.significant), ("perplexity", wording.perplexity)):
        values = [run.by_task(quantity) for run in runs]
        for task in dict.fromkeys(t for v in values for t in v):
            rows[f"{_title(runs, task)} {quantity}"] = [say(v.get(task)) for v in values]
    return rows


def _routing(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    def row(say: Callable[[RunFolder], str]) -> list[str]:
        return ["dense" if run.dense else say(run) for run in runs]

    def logged(key: str, digits: int) -> Callable[[RunFolder], str]:
        return lambda run: wording.fixed(number(run.summary, "routing", key), digits)

    def dead(run: RunFolder) -> str:
        health = layer_health(run)
        return "fixed rule" if health and all(x.fixed for x in health) else logged("dead_experts", 0)(run)

    rows = {
        "dropped late in training": row(dropped),
        "dead experts": row(dead),
        "load CV": row(logged("load_cv", 2)),
        "router entropy": row(logged("entropy", 2)),
    }
    if any(experts_per_token(run) is not None for run in runs):
        rows["experts per token"] = row(lambda run: wording.fixed(experts_per_token(run), 2))
    return rows


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]], corner: str = "") -> Table:
    return Table([corner, *names], [(name, *values) for name, values in rows.items()], title)


def _differences(
    title: str, corner: str, names: Sequence[str], rows: _Rows, say: Callable[[float | None], str]
) -> Table:
    """Every value, and in brackets how it differs from the first run's."""

    def told(first: float | None, value: float | None) -> str:
        if value is None or first is None:
            return say(value)
        return f"{say(value)} ({chr(0x2212) if value < first else '+'}{say(abs(value - first))})"

    cells = {name: [say(first), *(told(first, v) for v in others)] for name, (first, *others) in rows.items()}
    return _table(title, names, cells, corner)


def _tile(name: str, run: RunFolder) -> Tile:
    cost = costs(run)
    remark = f"{cost['active parameters']} active parameters, {cost['tokens per second']} tokens/s"
    if run.translates:
        return Tile(f"BLEU, {name}", wording.fixed(run.scores("bleu").average), remark)
    return Tile(f"Perplexity, {name}", wording.perplexity(main_task(run).perplexity), remark)


def _dots(title: str, names: Sequence[str], rows: _Rows, kind: str, *, perplexity: bool = False) -> list[Figure]:
    """One mark for each run and row; the first row is the average of the others."""
    rows = dict(list(rows.items())[1:])
    columns = {n: [math.nan if (v := row[i]) is None else v for row in rows.values()] for i, n in enumerate(names)}
    description = f"{title} by {kind} and run; the numbers are in the table"
    words = caption("compared", title=title, kind=kind, side="left" if perplexity else "right")
    return [Figure(*words, Dots(list(rows), columns, description, perplexity=perplexity))] if rows else []


def _quality(names: Sequence[str], scores: _Rows, bleu: Table, chrf: Table) -> Section:
    if len(bleu.rows) < 2:
        return Section(*heading("compared_translation"), ["None of these runs has measured BLEU."])
    numbers = Figure("BLEU", table=bleu, numbers=chrf if chrf.rows else None, fold="chrF")
    cells = [[figure] for figure in (*_dots("BLEU", names, scores, "direction"), numbers)]
    return Section(*heading("compared_translation"), cells=cells)


def _held_out(
    names: Sequence[str],
    perplexities: Mapping[str, _Rows],
    tables: Mapping[str, Table],
    accuracies: Mapping[str, Sequence[str]],
) -> Section:
    cells = []
    for task, rows in perplexities.items():
        numbers = [Figure(tables[task].title, table=tables[task])]
        if task in accuracies:
            numbers.append(Figure("Accuracy", table=_table("", names, {"all text": accuracies[task]})))
        dots = _dots(tables[task].title, names, rows, "language", perplexity=True)
        cells += [*([figure] for figure in dots), numbers]
    notes = [] if cells else ["None of these runs has measured a perplexity."]
    return Section(*heading("compared_prediction"), notes, cells)


def _progress(runs: Sequence[RunFolder], names: Sequence[str]) -> Section:
    bleu = any(run.translates for run in runs)
    better = "sentences: higher BLEU and lower loss are better" if bleu else "text: lower loss is better"

    def figure(column: str, title: str, see: str, description: str, *, from_zero: bool = False) -> Figure:
        lines = [
            Line(name, run.metrics[column], CYCLE[i % len(CYCLE)], "points")
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
            if column in run.metrics
        ]
        return Figure(title, see, chart=Curves(lines, description, start_at_zero=from_zero, height=2.3))

    figures = []
    if any("valid/bleu/average" in run.metrics for run in runs):
        description = "Validation BLEU of every run over steps"
        see = "Average over all directions."
        figures.append(figure("valid/bleu/average", "BLEU", see, description, from_zero=True))
    logged = {c: run for run in reversed(runs) for c in run.metrics if c.startswith("valid/") and c.endswith("/loss")}
    for column in dict.fromkeys(c for run in runs for c in run.metrics if c in logged):
        named = logged[column].task(column.split("/")[1])
        description = f"{named.title}: validation loss of every run over steps"
        figures.append(figure(column, named.title, f"{named.explanation} Validation loss.", description))
    notes = [] if figures else ["No validation loss was logged."]
    return Section(*heading("progress", better=better), notes, [[figure] for figure in figures])
