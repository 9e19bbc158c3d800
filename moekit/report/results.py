"""What a run came to: its headline numbers, its scores on held-out text, and the tables that go into a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moekit.report import wording
from moekit.report.curves import curve_table
from moekit.report.experts import health_table
from moekit.report.plots import Bars, Curves, Line
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
from moekit.report.run_folder import RunFolder, Scores, Series, dig, loads, number, sides
from moekit.report.style import SEQUENTIAL_LEVELS, sequential_class
from moekit.report.view import Figure, Heat, Scale, Section, Table, Tile

ORIGIN = {"test": "test set", "valid": "last validation"}
_NEAR = 5
_NOT_TESTED = "These are scores of the last validation, not of the test set."


def about(run: RunFolder) -> str:
    """Data, languages and experts in one line."""
    parts = [str(dig(run.summary, "data", "source") or "")]
    if run.languages:
        parts.append(f"{wording.count(len(run.languages), 'language')} ({', '.join(run.languages)})")
    if sizes := sorted({len(loads(layer)) for layer in run.layers}):
        layers = wording.count(len(run.layers), "Mixture-of-Experts layer")
        parts.append(f"{layers} of {' or '.join(map(str, sizes))} experts")
    return " · ".join(filter(None, parts)) or run.path.resolve().name


def costs(run: RunFolder) -> dict[str, str]:
    """Size, work and pace of a run in words, by name; a dash where the folder does not say."""
    return {
        "parameters": wording.short(number(run.summary, "parameters", "total")),
        "active parameters": wording.short(number(run.summary, "parameters", "active")),
        "steps": f"{run.steps:,}" if run.steps else wording.MISSING,
        "tokens": wording.short(number(run.summary, "tokens")),
        "tokens per second": wording.short(run.tokens_per_second),
        "time": wording.duration(number(run.summary, "wall_seconds")),
        "peak memory": wording.memory(number(run.summary, "peak_memory", "bytes")),
        "forecast": wording.memory(number(run.summary, "peak_memory", "forecast")),
    }


def known(value: str, phrase: str = "{}") -> str:
    """`value` in `phrase`; "" where it is not known."""
    return "" if value == wording.MISSING else phrase.format(value)


def tiles(run: RunFolder) -> list[Tile]:
    """Headline numbers; of those behind the first only what is known."""
    cost = costs(run)
    total, active = number(run.summary, "parameters", "total"), number(run.summary, "parameters", "active")
    steps = wording.count(run.steps, "step") if run.steps else ""
    found = [
        *score_tiles(run),
        Tile("Speed", cost["tokens per second"], "tokens per second"),
        Tile(
            "Memory", cost["peak memory"], f"of a process at its fullest{known(cost['forecast'], ', forecast {}')}"
        ),
        Tile("Parameters", cost["parameters"], "in total"),
        Tile(
            "Active",
            cost["active parameters"],
            f"{wording.percent(active / total, 0)} of all for a token" if active and total else "for a token",
        ),
        Tile("Time", cost["time"], ", ".join(filter(None, (steps, known(cost["tokens"], "{} tokens")))))
        if known(cost["time"])
        else Tile("Steps", cost["steps"], "taken so far"),
    ]
    return [tile for i, tile in enumerate(found) if i == 0 or known(tile.value)]


def score_tiles(run: RunFolder) -> list[Tile]:
    """Three scores: BLEU, chrF and perplexity of a translation, else perplexity, accuracy and loss."""
    if run.translates:
        bleu, chrf, ppl = run.scores("bleu"), run.scores("chrf"), run.by_task("perplexity")
        task = next((t for t in ("translation", *ppl) if t in ppl), "")
        where = f"{ORIGIN[bleu.origin]}, {wording.count(len(bleu.directions), 'direction')}"
        return [
            Tile("BLEU, average", wording.fixed(bleu.average), "not measured" if bleu.average is None else where),
            Tile("chrF, average", wording.fixed(chrf.average), ORIGIN[chrf.origin]),
            Tile("Perplexity", wording.perplexity(ppl.get(task)), run.task(task).title.lower() if task else ""),
        ]
    found = main_task(run)
    names = list(found.languages)
    spoken = wording.count(len(names), "language") if len(names) > 1 else "".join(names)
    where = ", ".join(filter(None, (ORIGIN[found.origin], spoken)))
    return [
        Tile("Perplexity", wording.perplexity(found.perplexity), "not measured" if found.perplexity is None else where),
        Tile("Accuracy", wording.percent(found.accuracy), f"of {run.task(found.task).title.lower()}"),
        Tile("Loss", wording.significant(found.loss), "nats per token"),
    ]


def tables(run: RunFolder) -> list[Table]:
    """The tables of a run that are worth a place in a text."""
    losses, perplexities = run.by_task("loss"), run.by_task("perplexity")
    validated = [
        (run.task(t).title, wording.significant(losses.get(t)), wording.perplexity(perplexities.get(t)))
        for t in dict.fromkeys([*losses, *perplexities])
    ]
    found = [
        *rankings(run),
        Table(["task", "validation loss", "perplexity"], validated, "Tasks"),
        health_table(run),
    ]
    return [table for table in found if table.rows]


def rankings(run: RunFolder) -> list[Table]:
    """Scores by direction or by language, best first, and what the test says of each of several tasks."""
    if run.translates:
        scores = {"BLEU": run.scores("bleu"), "chrF": run.scores("chrf")}
        bleu, chrf = (found.directions for found in scores.values())
        names = sorted(dict.fromkeys([*bleu, *chrf]), key=lambda d: -bleu.get(d, chrf.get(d, 0.0)))
        rows = [(d, wording.fixed(bleu.get(d)), wording.fixed(chrf.get(d))) for d in names]
        signatures = {name: found.signature for name, found in scores.items() if found.signature}
        return [Table(["direction", "BLEU", "chrF"], rows, "Translation quality", signatures)]
    tested = [x for x in predictions(run) if x.origin == "test"]
    scores = [_task_scores(run, tested)] if len(tested) > 1 else []  # of one task the headline says it all
    return scores + [_by_language(run, x, several=len(tested) > 1) for x in tested]


def quality(run: RunFolder) -> Section:
    """BLEU and chrF by direction, as bars and matrices, and how they grew; the perplexity of other runs."""
    return _translation(run) if run.translates else _prediction(run)


def _translation(run: RunFolder) -> Section:
    lead = (
        "BLEU counts words and phrases a translation shares with the reference, chrF letters; both run from 0 to 100, "
        "and chrF is the kinder one to rich morphology."
    )
    scores = {"BLEU": run.scores("bleu"), "chrF": run.scores("chrf")}
    (table,) = rankings(run)
    names = [row[0] for row in table.rows]
    if not names:
        why = f"No translation was scored yet: the command test does it. {run.notes.get('summary.json', '')}"
        return Section("scores", "Quality", "Translation quality", lead, [why])
    bars, dots = ([found.directions.get(n, math.nan) for n in names] for found in scores.values())
    description = f"BLEU and chrF of {len(names)} directions; the numbers are in the table below"
    left = Figure(
        "BLEU and chrF by direction",
        "One row for each direction, best first: bars are BLEU, dots chrF.",
        "a few directions lag far behind: they may have too little data or weight in the mixture.",
        Bars(names, bars, description, dots, ("BLEU", "chrF")),
        numbers=table,
    )
    matrices = [_matrix(name, found, run.languages) for name, found in scores.items()]
    return Section(
        "scores",
        "Quality",
        "Translation quality",
        lead,
        cells=[[left, *_growth(run)], [figure for figure in matrices if figure is not None]],
        remark=_NOT_TESTED if scores["BLEU"].origin == "valid" else "",
        signatures=table.signatures,
    )


def _matrix(title: str, found: Scores, order: list[str]) -> Figure | None:
    pairs = {sides(d): v for d, v in found.directions.items() if "-" in d}
    if not pairs:
        return None
    spoken = {x for pair in pairs for x in pair}
    names = sorted(spoken, key=lambda x: (order.index(x) if x in order else len(order), x))
    pivot = next((x for x in names if all(x in p for p in pairs)), None)
    if len(names) > 6 and pivot is not None:
        corner, columns, rows, least = "language", [f"into {pivot}", f"from {pivot}"], [*names], "0"
        rows.remove(pivot)
        values = [[pairs.get((x, pivot)), pairs.get((pivot, x))] for x in rows]
        see = f"Every direction has {pivot} on one side, so the map has two columns: into {pivot} and out of it."
    else:
        rows, columns = ([x for x in names if any(pair[side] == x for pair in pairs)] for side in (0, 1))
        corner, least = "from \\ to", f"{3 + 2.4 * len(columns):.1f}rem"
        values = [[pairs.get((s, t)) for t in columns] for s in rows]
        see = "Source languages are rows, target languages are columns; the scale runs from the worst to the best."
    low, high = min(found.directions.values()), max(found.directions.values())
    cells = [[(sequential_class(v, low, high), known(wording.fixed(v))) for v in line] for line in values]
    return Figure(
        f"{title} from every language into every other",
        see,
        "a whole row (a source that is not understood) or column (a target that is not mastered) is low.",
        heats=[Heat(corner, columns, [*zip(rows, cells, strict=True)], "matrix", least=least)],
        scale=Scale([f"s{i}" for i in range(SEQUENTIAL_LEVELS)], wording.fixed(low), wording.fixed(high)),
    )


def _growth(run: RunFolder) -> list[Figure]:
    found = {n.removeprefix("valid/bleu/"): s for n, s in run.metrics.items() if n.startswith("valid/bleu/")}
    average = found.pop("average", None)
    if average is None or len(average.finite.value) < 2:
        return []
    lines = [Line("" if i else "one direction", s, "muted", "faint") for i, s in enumerate(found.values())]
    lines.append(Line("average", average, "blue", "points"))
    return [
        Figure(
            "Validation BLEU during training",
            "The blue line is the average, each grey line one direction.",
            "the lines are still steep at the end (train longer) or fall (overfitting).",
            Curves(lines, "Validation BLEU over steps", start_at_zero=True),
            numbers=curve_table({"average BLEU": average}),
        )
    ]


def _prediction(run: RunFolder) -> Section:
    size = number(run.summary, "data", "vocab_size")
    blind = f" Blind guessing would score {wording.fixed(size, 0)}, the size of the vocabulary." if size else ""
    lead = (
        "Perplexity: among how many equally likely tokens the model hesitates, on average, at each token it predicts "
        f"of text it never saw. 1 is certainty, lower is better.{blind}"
    )
    found = predictions(run)
    title = "Quality on held-out text"
    if not found:
        why = f"Nothing was tested yet: the command test does it. {run.notes.get('summary.json', '')}".strip()
        return Section("scores", "Quality", title, lead, [why])
    several = len(found) > 1
    left = [_language_bars(run, x, several=several) for x in found if len(x.languages) > 1]
    right = [
        Figure(
            f"Scores of the {ORIGIN[found[0].origin]}",
            "Loss in nats per predicted token; perplexity is its exponential; accuracy is the share of predictions "
            "that hit the right token.",
            table=_task_scores(run, found),
        ),
        *(f for x in found if x.perplexity is not None for f in _decline(run, x.task, several=several)),
    ]
    cells = [left, right] if left else [[figure] for figure in right]
    remark = _NOT_TESTED if found[0].origin == "valid" else ""
    return Section("scores", "Quality", title, lead, cells=cells, remark=remark)


def _task_scores(run: RunFolder, found: Sequence[TaskScores]) -> Table:
    rows = [
        (
            run.task(x.task).title,
            wording.significant(x.loss),
            wording.perplexity(x.perplexity),
            wording.percent(x.accuracy),
        )
        for x in found
    ]
    return Table(["task", "loss", "perplexity", "accuracy"], rows, "Test")


def _by_language(run: RunFolder, found: TaskScores, *, several: bool) -> Table:
    rows = [(name, wording.perplexity(found.languages[name])) for name in languages_by_perplexity(found)]
    return Table(["language", "perplexity"], rows, _of_task(run, "Perplexity by language", found.task, several=several))


def _of_task(run: RunFolder, title: str, task: str, *, several: bool) -> str:
    return f"{title}: {run.task(task).title}" if several else title


def _language_bars(run: RunFolder, found: TaskScores, *, several: bool) -> Figure:
    table = _by_language(run, found, several=several)
    names = languages_by_perplexity(found)
    description = f"Perplexity of {len(names)} languages; the numbers are in the table below"
    return Figure(
        table.title,
        "One row for each language, best first; shorter bars are better. The tokenizer cuts languages into tokens of "
        "different lengths, so compare a language with itself in another run rather than with its neighbours.",
        "one language is several times worse than all others: it may have too little data or weight in the mixture.",
        Bars(names, [found.languages[name] for name in names], description, perplexity=True),
        numbers=table,
    )


def _decline(run: RunFolder, task: str, *, several: bool) -> list[Figure]:
    logged = run.metrics.get(f"valid/{task}/loss")
    if logged is None or len(logged.finite.value) < 2:
        return []
    step, value = logged.finite.step, np.exp(np.minimum(logged.finite.value, 700.0))
    near = value <= _NEAR * value[-1]  # an untrained model would squeeze all the rest flat
    series = Series(step[near], value[near])
    if len(series.value) < 2:
        return []
    cut = f", without the first steps, where it was over {_NEAR} times that of the end"
    return [
        Figure(
            _of_task(run, "Validation perplexity during training", task, several=several),
            f"All languages together{'' if near.all() else cut}.",
            "the line is still steep at the end (train longer) or rises (overfitting).",
            Curves([Line("", series, "blue", "points")], "Validation perplexity over steps"),
            numbers=curve_table({"perplexity": series}, wording.perplexity),
        )
    ]
