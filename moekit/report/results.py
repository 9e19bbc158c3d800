"""What a run came to: its headline numbers, its scores on held-out text, and the tables that go into a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from moekit.report import wording
from moekit.report.agreement import agreement_table, agreement_tiles
from moekit.report.curves import curve_table
from moekit.report.domains import domain_table
from moekit.report.experts import health_table
from moekit.report.health import by_rule, dropped, experts_per_token
from moekit.report.plots import Bars, Curves, Line
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
from moekit.report.recall import above_floor, recall_table, recall_tiles
from moekit.report.run_folder import DirectionScores, RunFolder, Series, dig, loads, names_in, number, sides
from moekit.report.style import SEQUENTIAL_LEVELS, sequential_class
from moekit.report.typical import typical_table
from moekit.report.view import Figure, Heat, PageSection, Scale, Table, Tile, caption, heading

ORIGIN = {"test": "test set", "valid": "last validation", "held-out": "held-out text"}
_NEAR = 5
_TRANSLATION = {"BLEU": "bleu", "chrF": "chrf"}  # the scores by label, which have places of their own
_NOT_TESTED = "These are scores of the last validation, not of the test set."


def about(run: RunFolder) -> str:
    """What was fine-tuned, data, languages and experts in one line."""
    parts = [str(dig(run.summary, *key) or "") for key in (("folder",), ("data", "source"))]
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
        "work": known(wording.short(number(run.summary, "speed", "flops_per_second")), "{} FLOP/s") or wording.MISSING,
        "share": _share(run),
        "step time": wording.seconds(number(run.summary, "speed", "step_seconds")),
        "peak memory": wording.memory(number(run.summary, "peak_memory", "bytes")),
        "forecast": wording.memory(number(run.summary, "peak_memory", "forecast")),
    }


def _share(run: RunFolder) -> str:
    """What of the machine's rate the model used, in the planner's arithmetic."""
    share, rate = number(run.summary, "speed", "share"), number(run.summary, "speed", "product_rate")
    if not rate:
        return "FLOP/s, by the planner's arithmetic"
    return f"FLOP/s{known(wording.percent(share, 0), ', {} of')} the {wording.short(rate)} of a large matrix product"


def _planned(run: RunFolder) -> list[str]:
    """The planner's forecast of the time: all operations at the machine's own rate."""
    planned = number(run.summary, "speed", "forecast_seconds")
    return [f"{wording.duration(planned)} at the machine's full rate"] if planned else []


def routing_words(run: RunFolder) -> dict[str, str]:
    """How the experts of a run fared, by quantity; a dash where the folder does not say."""
    said = dig(run.summary, "routing")
    return {
        "dropped late in training": dropped(run),
        "dead experts": "fixed rule" if by_rule(run) else wording.fixed(number(said, "dead_experts"), 0),
        "load CV": wording.fixed(number(said, "load_cv"), 2),
        "router entropy": wording.fixed(number(said, "entropy"), 2),
        "experts per token": wording.fixed(experts_per_token(run), 2),
    }


def known(value: str, phrase: str = "{}") -> str:
    """`value` in `phrase`; "" where it is not known."""
    return "" if value == wording.MISSING else phrase.format(value)


def tiles(run: RunFolder) -> list[Tile]:
    """Headline numbers; of those behind the first only what is known."""
    cost = costs(run)
    total, active = number(run.summary, "parameters", "total"), number(run.summary, "parameters", "active")
    trained = number(run.summary, "parameters", "trained")
    share, trained_share = (
        f"{wording.percent(part / total, 0)} of all " if part and total else "" for part in (active, trained)
    )
    steps = [wording.count(run.steps, "step") if run.steps else "", known(cost["tokens"], "{} tokens")]
    found = [
        *score_tiles(run),
        Tile("Speed", cost["tokens per second"], "tokens per second"),
        Tile("Work", cost["work"].removesuffix(" FLOP/s"), cost["share"]),
        Tile("Memory", cost["peak memory"], f"of a process at its fullest{known(cost['forecast'], ', forecast {}')}"),
        Tile("Parameters", cost["parameters"], "in total"),
        Tile("Active", cost["active parameters"], f"{share}for a token"),
        Tile("Trained", wording.short(trained), f"{trained_share}parameters"),
        Tile("Time", cost["time"], ", ".join([*filter(None, steps), *_planned(run)]))
        if known(cost["time"])
        else Tile("Steps", cost["steps"], known(cost["tokens"], "{} tokens") or "taken so far"),
    ]
    found[3:3] = recall_tiles(run) + agreement_tiles(run)
    return [tile for i, tile in enumerate(found) if i == 0 or known(tile.value)]


def score_tiles(run: RunFolder) -> list[Tile]:
    """BLEU, chrF and perplexity of a translation, else perplexity, accuracy and loss, with that before fine-tuning."""
    if run.translates:
        bleu, chrf, ppl = run.scores("bleu"), run.scores("chrf"), run.by_task("perplexity")
        task = next((t for t in ("translation", *ppl) if t in ppl), "")
        where = f"{ORIGIN[bleu.origin]}, {wording.count(len(bleu.directions), 'direction')}"
        return [
            Tile("BLEU, average", wording.fixed(bleu.average), "not measured" if bleu.average is None else where),
            Tile("chrF, average", wording.fixed(chrf.average), ORIGIN[chrf.origin]),
            Tile("Perplexity", wording.perplexity(ppl.get(task)), run.task(task).title.lower() if task else ""),
        ]
    written = [
        Tile(label, wording.fixed(scored.average), run.task(task).title.lower())
        for task, scores in answers(run).items()
        for label, scored in list(scores.items())[:2]
    ]
    found = main_task(run)
    names = list(found.languages)
    spoken = wording.count(len(names), "language") if len(names) > 1 else "".join(names)
    where = ", ".join(filter(None, (ORIGIN[found.origin], spoken)))
    accuracy = Tile(
        "Accuracy",
        wording.percent(found.accuracy),
        f"of {run.task(found.task).title.lower()}"
        f"{known(wording.percent(found.majority), ', {} by always the most frequent answer')}",
    )
    before = Tile("Before", wording.significant(number(run.summary, "before")), "nats per token, before training")
    return [
        *written,
        Tile("Perplexity", wording.perplexity(found.perplexity), "not measured" if found.perplexity is None else where),
        *([] if run.tuned else [accuracy]),
        Tile("Loss", wording.significant(found.loss), f"nats per token{_above(run, found)}"),
        *([before] if known(before.value) else []),
    ]


def _above(run: RunFolder, found: TaskScores) -> str:
    """How far a loss is above the floor, where that is known."""
    above = above_floor(run, found.task, found.loss, found.origin)
    return "" if above is None else f", {wording.fixed(above, 3)} above the floor"


def tables(run: RunFolder) -> list[Table]:
    """The tables of a run that are worth a place in a text."""
    losses, perplexities = run.by_task("loss"), run.by_task("perplexity")
    validated = [
        (run.task(t).title, wording.significant(losses.get(t)), wording.perplexity(perplexities.get(t)))
        for t in dict.fromkeys([*losses, *perplexities])
    ]
    tasks = Table(["task", "validation loss", "perplexity"], validated, "Tasks")
    return [
        table
        for table in (
            *rankings(run),
            *answer_tables(run),
            tasks,
            recall_table(run),
            agreement_table(run),
            domain_table(run),
            health_table(run),
            typical_table(run),
        )
        if table.rows
    ]


def rankings(run: RunFolder) -> list[Table]:
    """Scores by direction or by language, best first, and what the test says of each of several tasks."""
    if run.translates:
        scores = {label: run.scores(name) for label, name in _TRANSLATION.items()}
        bleu, chrf = (found.directions for found in scores.values())
        names = sorted(dict.fromkeys([*bleu, *chrf]), key=lambda d: -bleu.get(d, chrf.get(d, 0.0)))
        rows = [(d, wording.fixed(bleu.get(d)), wording.fixed(chrf.get(d))) for d in names]
        return [Table(["direction", *scores], rows, "Translation quality", _signatures(scores))]
    tested = [x for x in predictions(run) if x.origin == "test"]
    if len(tested) < 2:  # of one task the headline says it all
        return [_by_language(x, "") for x in tested]
    return [_task_scores(run, tested), *(_by_language(x, f": {run.task(x.task).title}") for x in tested)]


def answers(run: RunFolder) -> dict[str, dict[str, DirectionScores]]:
    """Scores by label, as "Exact match", of each task but translation whose written answers were tested, by its name.

    The run's record names them.
    """
    tested = {}
    for task in names_in(dig(run.summary, "tasks")):
        labels = dig(run.summary, "tasks", task, "scores")
        scores = {str(labels[n]): run.scores(n) for n in names_in(labels) if n not in _TRANSLATION.values()}
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
        tables.append(Table(["direction", *scores], rows, run.task(task).title, _signatures(scores)))
    return tables


def _signatures(scores: Mapping[str, DirectionScores]) -> dict[str, str]:
    return {label: found.signature for label, found in scores.items() if found.signature}


def answer_section(run: RunFolder) -> PageSection | None:
    """The part of the page with these tables; None where no such answers were tested."""
    cells = [
        [Figure(table.title, f"{run.task(task).explanation} In percent, of held-out examples.", table=table)]
        for task, table in zip(answers(run), answer_tables(run), strict=True)
    ]
    return PageSection(*heading("answers"), cells=cells) if cells else None


def quality(run: RunFolder) -> PageSection:
    """BLEU and chrF by direction, as bars and matrices, and how they grew; the perplexity of other runs."""
    return _translation(run) if run.translates else _prediction(run)


def _translation(run: RunFolder) -> PageSection:
    words = heading("translation")
    scores = {label: run.scores(name) for label, name in _TRANSLATION.items()}
    (table,) = rankings(run)
    names = [row[0] for row in table.rows]
    if not names:
        why = f"No translation was scored yet: the command test does it. {run.notes.get('summary.json', '')}"
        return PageSection(*words, [why])
    bars, dots = ([found.directions.get(n, math.nan) for n in names] for found in scores.values())
    description = f"BLEU and chrF of {len(names)} directions; the numbers are in the table below"
    chart = Bars(names, bars, description, dots, ("BLEU", "chrF"))
    left = [Figure(*caption("directions"), chart, numbers=table, name="directions"), *_growth(run)]
    right = [figure for name, found in scores.items() for figure in _matrix(name, found, run.languages)]
    remark = _NOT_TESTED if scores["BLEU"].origin == "valid" else _copied(run)
    return PageSection(*words, cells=[left, right], remark=remark, signatures=table.signatures)


def _copied(run: RunFolder) -> str:
    """What copying the source would score, where the test measured it."""
    said = ((x, wording.fixed(number(run.summary, "copied", name, "average"))) for x, name in _TRANSLATION.items())
    parts = [f"{label} {value}" for label, value in said if known(value)]
    return f"Copying the source would score {' and '.join(parts)}." if parts else ""


def _matrix(metric: str, found: DirectionScores, order: list[str]) -> list[Figure]:
    pairs = {sides(d): v for d, v in found.directions.items() if "-" in d}
    if min(len({pair[side] for pair in pairs}) for side in (0, 1)) < 2:
        return []  # the bars say it all
    spoken = {x for pair in pairs for x in pair}
    names = sorted(spoken, key=lambda x: (order.index(x) if x in order else len(order), x))
    pivot = next((x for x in names if all(x in p for p in pairs)), None) if len(names) > 6 else None
    if pivot is not None:
        rows, columns = [x for x in names if x != pivot], [f"into {pivot}", f"from {pivot}"]
        values = [[pairs.get((x, pivot)), pairs.get((pivot, x))] for x in rows]
        words, corner, least = caption("pivot", metric=metric, pivot=pivot), "language", "0"
    else:
        rows, columns = ([x for x in names if any(pair[side] == x for pair in pairs)] for side in (0, 1))
        values = [[pairs.get((s, t)) for t in columns] for s in rows]
        words, corner, least = caption("matrix", metric=metric), "from \\ to", f"{3 + 2.4 * len(columns):.1f}rem"
    low, high = 0.0, 100.0  # of the score, not of this run: the same shade is the same score everywhere
    cells = [[(sequential_class(v, low, high), known(wording.fixed(v))) for v in line] for line in values]
    heat = Heat(corner, columns, [*zip(rows, cells, strict=True)], "matrix", least=least)
    scale = Scale([f"s{i}" for i in range(SEQUENTIAL_LEVELS)], f"{low:g}", f"{high:g}")
    return [Figure(*words, heats=[heat], scale=scale, name=f"{metric.lower()}_matrix")]


def _growth(run: RunFolder) -> list[Figure]:
    average = run.logged("valid/bleu/average", least=2)
    if average is None:
        return []
    found = [s for n, s in run.metrics.items() if n.startswith("valid/bleu/") and s is not average]
    lines = [Line("" if i else "one direction", s, "muted", "faint") for i, s in enumerate(found)]
    lines.append(Line("average", average, "blue", "points"))
    numbers = {"average BLEU": average}
    if (chrf := run.logged("valid/chrf/average", least=2)) is not None:
        numbers["average chrF"] = chrf
        lines.append(Line("average chrF", chrf, "red", "points"))
    chart = Curves(lines, "Validation BLEU over steps", start_at_zero=True)
    return [Figure(*caption("bleu_growth"), chart, numbers=curve_table(numbers), name="bleu")]


def _prediction(run: RunFolder) -> PageSection:
    size = number(run.summary, "data", "vocab_size")
    blind = f" Blind guessing would score {wording.fixed(size, 0)}, the size of the vocabulary." if size else ""
    words = heading("prediction", blind=blind)
    found = predictions(run)
    if not found:
        why = f"Nothing was tested yet: the command test does it. {run.notes.get('summary.json', '')}".strip()
        why = "No held-out loss was measured yet." if run.tuned else why
        return PageSection(*words, [why])
    names = {x.task: f": {run.task(x.task).title}" if len(found) > 1 else "" for x in found}
    left = [_language_bars(x, names[x.task]) for x in found if len(x.languages) > 1]
    right = [Figure(*caption("task_scores", origin=ORIGIN[found[0].origin]), table=_task_scores(run, found))]
    right += [f for x in found if x.perplexity is not None for f in _decline(run, x.task, names[x.task])]
    cells = [left, right] if left else [[figure] for figure in right]
    return PageSection(*words, cells=cells, remark=_NOT_TESTED if found[0].origin == "valid" else "")


def _task_scores(run: RunFolder, found: Sequence[TaskScores]) -> Table:
    above = [above_floor(run, x.task, x.loss, x.origin) for x in found]
    floored = ["above floor"] if any(value is not None for value in above) else []
    known_shares = [name for name in ("majority", "chance") if any(getattr(x, name) is not None for x in found)]
    rows = [
        (
            run.task(x.task).title,
            wording.significant(x.loss),
            *([wording.fixed(over, 3)] if floored else []),
            wording.perplexity(x.perplexity),
            *(wording.percent(getattr(x, name)) for name in ("accuracy", *known_shares)),
        )
        for x, over in zip(found, above, strict=True)
    ]
    return Table(["task", "loss", *floored, "perplexity", "accuracy", *known_shares], rows, "Test")


def _by_language(found: TaskScores, task: str) -> Table:
    rows = [(name, wording.perplexity(found.languages[name])) for name in languages_by_perplexity(found)]
    return Table(["language", "perplexity"], rows, f"Perplexity by language{task}")


def _language_bars(found: TaskScores, task: str) -> Figure:
    names = languages_by_perplexity(found)
    description = f"Perplexity of {len(names)} languages; the numbers are in the table below"
    chart = Bars(names, [found.languages[name] for name in names], description, perplexity=True)
    return Figure(
        *caption("languages", task=task), chart, numbers=_by_language(found, task), name=f"languages/{found.task}"
    )


def _decline(run: RunFolder, task: str, named: str) -> list[Figure]:
    logged = run.logged(f"valid/{task}/loss", least=2)
    if logged is None:
        return []
    step, value = logged.finite.step, np.exp(np.minimum(logged.finite.value, 700.0))
    first = int(np.argmax(value <= _NEAR * value[-1]))  # an untrained model would squeeze all the rest flat
    series = Series(step[first:], value[first:])
    if len(series.value) < 2:
        return []
    cut = "" if not first else f", without the first steps, where it was over {_NEAR} times that of the end"
    chart = Curves([Line("", series, "blue", "points")], "Validation perplexity over steps")
    numbers = curve_table({"perplexity": series}, wording.perplexity)
    return [
        Figure(*caption("perplexity_growth", task=named, cut=cut), chart, numbers=numbers, name=f"perplexity/{task}")
    ]
