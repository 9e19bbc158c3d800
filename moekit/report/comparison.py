"""`write_comparison`: several runs side by side, the first one being what the others are measured against."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moekit.errors import UserError
from moekit.report import markdown, page, plots, wording
from moekit.report.health import dropped, experts_per_token, layer_health
from moekit.report.page import text
from moekit.report.plots import Line
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
from moekit.report.run_folder import RunFolder, dig, number, read_run
from moekit.report.style import CYCLE
from moekit.report.tasks import EXPLAINED, TASKS, task_title

MAX_RUNS = 8


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
    runs = [read_run(Path(d)) for d in run_dirs]
    names = _names(runs)
    out = Path(out)
    html_path = out if out.suffix in (".html", ".htm") else out / "comparison.html"
    page.write_text(html_path.with_suffix(".md"), _markdown(runs, names))
    return page.write_text(html_path, page.page(f"{' vs '.join(names)} · moekit", _html(runs, names)))


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its variant where that tells them apart, else recipe and variant, else the folder."""
    candidates = (
        [r.variant for r in runs],
        [r.name for r in runs],
        [r.path.resolve().name for r in runs],
        [str(r.path) for r in runs],
    )
    for names in candidates:
        if all(names) and len(set(names)) == len(runs):
            return names
    return [f"{r.path} ({i})" for i, r in enumerate(runs, start=1)]


def _warnings(runs: Sequence[RunFolder]) -> list[str]:
    """Why the numbers may not be comparable."""
    found = []
    data = {json.dumps(dig(r.summary, "data"), sort_keys=True, default=str) for r in runs if r.summary.get("data")}
    if len(data) > 1:
        found.append("These runs used different data, so their scores are not strictly comparable.")
    for metric in ("bleu", "chrf"):
        signatures = {r.scores(metric).signature for r in runs} - {""}
        if len(signatures) > 1:
            found.append(f"The {metric} signatures differ: {', '.join(sorted(signatures))}.")
        if len({r.scores(metric).origin for r in runs if r.scores(metric).average is not None}) > 1:
            found.append(f"Some {metric} scores are of the test set, others of the last validation.")
    return found + _prediction_warnings(runs)


def _prediction_warnings(runs: Sequence[RunFolder]) -> list[str]:
    texts = [main_task(run) for run in runs if not run.translates]
    found = []
    if texts and len(texts) < len(runs):
        found.append("Some of these runs translate and others do not: they have no score in common.")
    if len({x.task for x in texts if x.task}) > 1:
        found.append("The perplexities are of different tasks, so they are not comparable.")
    if len({x.origin for x in texts if x.perplexity is not None}) > 1:
        found.append("Some perplexities are of the test set, others of the last validation.")
    return found


def _directions(runs: Sequence[RunFolder], metric: str) -> list[str]:
    found: dict[str, float] = {}
    for run in runs:
        for direction, value in run.scores(metric).directions.items():
            found.setdefault(direction, value)
    return sorted(found, key=lambda d: -found[d])


def _score_rows(runs: Sequence[RunFolder], metric: str) -> list[tuple[str, list[float | None]]]:
    rows: list[tuple[str, list[float | None]]] = [("average", [r.scores(metric).average for r in runs])]
    return rows + [(d, [r.scores(metric).directions.get(d) for r in runs]) for d in _directions(runs, metric)]


def _cost_rows(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    columns = [dict(markdown.headline_rows(run)) for run in runs]
    keep = ("parameters", "active parameters", "steps", "tokens", "tokens per second", "time")
    return [(key, [column.get(key, wording.MISSING) for column in columns]) for key in keep]


def _task_rows(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    rows = []
    for quantity, say in (("loss", wording.significant), ("perplexity", wording.perplexity)):
        values = [run.by_task(quantity) for run in runs]
        for task in dict.fromkeys(t for v in values for t in v):
            rows.append((f"{task} {quantity}", [say(v.get(task)) for v in values]))
    return rows


def _routing_rows(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    quantities = {
        "dead experts": ("dead_experts", lambda v: wording.fixed(v, 0)),
        "load CV": ("load_cv", lambda v: wording.fixed(v, 2)),
        "router entropy": ("entropy", lambda v: wording.fixed(v, 2)),
    }
    rows = [
        (title, ["dense" if run.dense else say(number(run.summary, "routing", key)) for run in runs])
        for title, (key, say) in quantities.items()
    ]
    by_rule = [bool(health := layer_health(run)) and all(x.fixed for x in health) for run in runs]
    title, cells = rows[0]
    rows[0] = (title, ["fixed rule" if rule else cell for rule, cell in zip(by_rule, cells, strict=True)])
    used = [experts_per_token(run) for run in runs]
    if any(value is not None for value in used):
        rows.append(
            (
                "experts per token",
                ["dense" if r.dense else wording.fixed(u, 2) for r, u in zip(runs, used, strict=True)],
            )
        )
    drops = ["dense" if run.dense else dropped(run) for run in runs]
    return [("dropped late in training", drops), *rows]


def _with_difference(
    values: Sequence[float | None],
    say: Callable[[float | None], str] = wording.fixed,
) -> list[str]:
    first = values[0]
    told = [say(first)]
    for value in values[1:]:
        difference = ""
        if value is not None and first is not None:
            sign = "\u2212" if value < first else "+"
            difference = f" ({sign}{say(abs(value - first))})"
        told.append(say(value) + difference)
    return told


def _perplexity_tables(runs: Sequence[RunFolder]) -> dict[str, list[tuple[str, list[float | None]]]]:
    """By task: perplexity of all text and of every language, one value for each run."""
    by_run = [{} if run.translates else {x.task: x for x in predictions(run)} for run in runs]
    tables = {}
    for task in dict.fromkeys(t for found in by_run for t, x in found.items() if x.perplexity is not None):
        scores = [found.get(task, TaskScores(task)) for found in by_run]
        languages = list(dict.fromkeys(name for x in scores for name in languages_by_perplexity(x)))
        rows: list[tuple[str, list[float | None]]] = [("all text", [x.perplexity for x in scores])]
        if len(languages) > 1:  # a single language is all text
            rows += [(name, [x.languages.get(name) for x in scores]) for name in languages]
        tables[task] = rows
    return tables


def _accuracies(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """By task: one value for each run."""
    by_run = [{} if run.translates else {x.task: x.accuracy for x in predictions(run)} for run in runs]
    tasks = dict.fromkeys(t for found in by_run for t, value in found.items() if value is not None)
    return {t: [wording.percent(found.get(t)) for found in by_run] for t in tasks}


def _markdown(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    parts = [f"# {markdown.literal(' vs '.join(names))}"]
    parts += [f"> {markdown.literal(w)}" for w in _warnings(runs)]
    tables = _perplexity_tables(runs)
    for metric, title in (("bleu", "BLEU"), ("chrf", "chrF")):
        rows = [(name, *_with_difference(values)) for name, values in _score_rows(runs, metric)]
        if any(v is not None for _, values in _score_rows(runs, metric) for v in values):
            parts += [f"## {title}", markdown.table(["direction", *names], rows)]
    for task, found in tables.items():
        heading = f"## Perplexity: {task_title(task)}" if len(tables) > 1 else "## Perplexity"
        rows = [(name, *_with_difference(values, wording.perplexity)) for name, values in found]
        parts += [heading, markdown.table(["language", *names], rows)]
    if accuracies := _accuracies(runs):
        parts += ["## Accuracy", markdown.table(["task", *names], [(n, *v) for n, v in accuracies.items()])]
    parts += ["## Cost", markdown.table(["", *names], [(n, *v) for n, v in _cost_rows(runs)])]
    if tasks := _task_rows(runs):
        parts += ["## Tasks (validation)", markdown.table(["", *names], [(n, *v) for n, v in tasks])]
    parts += ["## Routing", markdown.table(["", *names], [(n, *v) for n, v in _routing_rows(runs)])]
    if len(runs) > 1 and (tables or any(r.scores("bleu").directions for r in runs)):
        parts.append(f"In brackets: the difference from {markdown.literal(names[0])}.")
    return "\n\n".join(parts) + "\n"


def _html(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    tiles = page.tiles(_tile(name, run) for name, run in zip(names, runs, strict=True))
    sections = [_quality(runs, names)] if any(run.translates for run in runs) else []
    sections += [_perplexities(runs, names)] if not all(run.translates for run in runs) else []
    notes = "".join(map(page.note, _warnings(runs)))
    return (
        f'<header class="top"><p class="eyebrow">moekit comparison</p><h1>{text(" vs ".join(names))}</h1>'
        f'<p class="lead">Differences are against the first run, {text(names[0])}.</p>{tiles}{notes}</header>\n<main>\n'
        + "\n".join((*sections, _progress(runs, names), _costs(runs, names)))
        + "\n</main>\n<footer>Made by moekit.</footer>"
    )


def _tile(name: str, run: RunFolder) -> tuple[str, str, str]:
    if run.translates:
        return f"BLEU, {name}", wording.fixed(run.scores("bleu").average), _cost(run)
    return f"Perplexity, {name}", wording.perplexity(main_task(run).perplexity), _cost(run)


def _cost(run: RunFolder) -> str:
    active = number(run.summary, "parameters", "active")
    return f"{wording.short(active)} active parameters, {wording.short(run.tokens_per_second)} tokens/s"


def _quality(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    directions = _directions(runs, "bleu")
    lead = "The same directions in the same order for every run."
    if not directions:
        return page.section("scores", "Translation quality", lead, page.note("None of these runs has measured BLEU."))
    columns = [
        (n, [r.scores("bleu").directions.get(d, math.nan) for d in directions])
        for n, r in zip(names, runs, strict=True)
    ]
    rows = [(name, *_with_difference(values)) for name, values in _score_rows(runs, "bleu")]
    chrf = [(name, *_with_difference(values)) for name, values in _score_rows(runs, "chrf")]
    html = page.figure(
        "BLEU by direction",
        "One row for each direction, one mark for each run; further right is better.",
        "the marks change order from row to row: the runs may differ by luck only.",
        plots.score_dots(directions, columns, description="BLEU by direction and run; the numbers are in the table"),
    )
    tables = f"<div><h3>BLEU</h3>{page.table(['direction', *names], rows)}"
    tables += f"<details><summary>chrF</summary>{page.table(['direction', *names], chrf)}</details></div>"
    return page.section("scores", "Translation quality", lead, f'<div class="grid">{html}{tables}</div>')


def _perplexities(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    title = "Quality on held-out text"
    lead = "Perplexity: among how many equally likely tokens a model hesitates, on average; lower is better."
    tables = _perplexity_tables(runs)
    if not tables:
        return page.section("perplexity", title, lead, page.note("None of these runs has measured a perplexity."))
    accuracies = _accuracies(runs)
    html = ""
    for task, found in tables.items():
        heading = f"Perplexity: {task_title(task)}" if len(tables) > 1 else "Perplexity"
        languages = [name for name, _ in found[1:]]
        if languages:
            columns = [
                (name, [math.nan if (v := values[i]) is None else v for _, values in found[1:]])
                for i, name in enumerate(names)
            ]
            html += page.figure(
                f"{heading} by language",
                "One row for each language, one mark for each run; further left is better.",
                "the marks change order from row to row: the runs may differ by luck only.",
                plots.perplexity_dots(
                    languages, columns, description=f"{heading} by language and run; the numbers are in the table"
                ),
            )
        rows = [(name, *_with_difference(values, wording.perplexity)) for name, values in found]
        numbers = f"<h3>{text(heading)}</h3>{page.table(['language', *names], rows)}"
        if cells := accuracies.get(task):
            numbers += f"<h3>Accuracy</h3>{page.table(['', *names], [('all text', *cells)])}"
        html += f"<div>{numbers}</div>"
    return page.section("perplexity", title, lead, f'<div class="grid">{html}</div>')


def _progress(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    bleu = any(run.translates for run in runs)
    lead = (
        "One line for each run over its steps, on held-out "
        f"{'sentences: higher BLEU and lower loss are better' if bleu else 'text: lower loss is better'}. Worry "
        "if one run stopped much earlier than another: then time, not the model, decided."
    )
    columns: Mapping[str, None] = dict.fromkeys(
        c for run in runs for c in run.metrics if c.startswith("valid/") and c.endswith("/loss")
    )
    figures = []
    if any("valid/bleu/average" in run.metrics for run in runs):
        lines = _lines(runs, names, "valid/bleu/average")
        drawing = plots.curves(
            lines, description="Validation BLEU of every run over steps", height=2.3, start_at_zero=True
        )
        figures.append(page.figure("BLEU", "Average over all directions.", "", drawing))
    for column in columns:
        task = column.split("/")[1]
        lines = _lines(runs, names, column)
        title = TASKS.get(task, task)
        figures.append(
            page.figure(
                title,
                f"{EXPLAINED.get(task, '')} Validation loss.",
                "",
                plots.curves(lines, description=f"{title}: validation loss of every run over steps", height=2.3),
            )
        )
    body = f'<div class="grid">{"".join(figures)}</div>' if figures else page.note("No validation loss was logged.")
    return page.section("progress", "Progress", lead, body)


def _lines(runs: Sequence[RunFolder], names: Sequence[str], column: str) -> list[Line]:
    return [
        Line(name, run.metrics[column], CYCLE[i % len(CYCLE)], "points")
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
        if column in run.metrics
    ]


def _costs(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    lead = "What each run cost, what its tasks came to, and how its experts fared."
    groups = (("Cost", _cost_rows(runs)), ("Tasks (validation)", _task_rows(runs)), ("Routing", _routing_rows(runs)))
    html = "".join(
        f"<div><h3>{title}</h3>{page.table(['', *names], [(n, *v) for n, v in rows])}</div>"
        for title, rows in groups
        if rows
    )
    return page.section("cost", "Cost and health", lead, f'<div class="grid">{html}</div>')
