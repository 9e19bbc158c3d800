"""Sections on what the model learned: headline, losses, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moekit.report import page, perplexity, plots, wording
from moekit.report.health import findings
from moekit.report.page import text
from moekit.report.plots import Line
from moekit.report.run_folder import RunFolder, Scores, Series, dig, loads, number, sides
from moekit.report.series import milestones, smooth, smoothing_window
from moekit.report.style import CYCLE, SEQUENTIAL_LEVELS, sequential_class
from moekit.report.tasks import EXPLAINED, TASKS


def _memory(run: RunFolder) -> tuple[str, str]:
    """The most that training held, and what was forecast."""
    return wording.memory(number(run.summary, "peak_memory", "bytes")), "of a process at its fullest" + (
        f", forecast {wording.memory(forecast)}"
        if (forecast := number(run.summary, "peak_memory", "forecast")) is not None
        else ""
    )


def headline(run: RunFolder) -> str:
    """Title, headline numbers and findings."""
    total, active = number(run.summary, "parameters", "total"), number(run.summary, "parameters", "active")
    share = f"{wording.percent(active / total, 0)} of all for a token" if active and total else "for a token"
    seconds, tokens = number(run.summary, "wall_seconds"), number(run.summary, "tokens")
    worked = [
        w
        for w in (
            wording.count(run.steps, "step") if run.steps else "",
            f"{wording.short(tokens)} tokens" if tokens else "",
        )
        if w
    ]
    tiles = [
        *(_translation_tiles(run) if run.translates else perplexity.tiles(run)),
        ("Speed", wording.short(run.tokens_per_second), "tokens per second"),
        ("Memory", *_memory(run)),
        ("Parameters", wording.short(total), "in total"),
        ("Active", wording.short(active), share),
        ("Time", wording.duration(seconds), ", ".join(worked))
        if seconds is not None
        else ("Steps", f"{run.steps:,}" if run.steps else wording.MISSING, "taken so far"),
    ]
    tiles = [tile for i, tile in enumerate(tiles) if i == 0 or tile[1] != wording.MISSING]
    items = "".join(f"<li{'' if f.good else ' class=bad'}>{text(f.text)}</li>" for f in findings(run))
    missing = (
        page.note("This run is not finished (it has no summary.json): numbers come from its metrics.")
        if not run.summary
        else ""
    )
    return (
        f'<header class="top"><p class="eyebrow">moekit run report</p><h1>{text(run.name)}</h1>'
        f'<p class="lead">{text(_about(run))}</p>{page.tiles(tiles)}'
        f'<ul class="findings">{items}</ul>{missing}</header>'
    )


def _translation_tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    bleu, chrf, ppl = run.scores("bleu"), run.scores("chrf"), run.by_task("perplexity")
    origin = {"test": "test set", "valid": "last validation"}
    directions = wording.count(len(bleu.directions), "direction")
    first = next((t for t in ("translation", *ppl) if t in ppl), None)
    return [
        (
            "BLEU, average",
            wording.fixed(bleu.average),
            f"{origin[bleu.origin]}, {directions}" if bleu.average is not None else "not measured",
        ),
        (
            "chrF, average",
            wording.fixed(chrf.average),
            origin[chrf.origin],
        ),
        (
            "Perplexity",
            wording.perplexity(ppl.get(first or "")),
            TASKS.get(first, first).lower() if first else "",
        ),
    ]


def losses(run: RunFolder) -> str:
    """Losses by task, learning rate and speed."""
    lead = (
        "A loss says how surprised the model is by the right answer, in nats per predicted token; lower is better, and "
        "it should fall quickly, then slowly. Blue is training, orange held-out sentences. Worry if orange rises while "
        "blue falls (overfitting), or if either jumps or stays flat from the start. Neither counts label "
        "smoothing or the weights of tasks."
    )
    figures = [_loss_figure(task, run.metrics) for task in tasks(run)]
    figures += _accuracy(run)
    named = (
        n for n in run.metrics if n in ("lr", "train/lr", "learning_rate", "train/learning_rate") or n[:3] == "lr-"
    )
    lr = run.metrics.get(next(named, ""))
    if lr is not None and len(lr.finite.value):
        figures.append(
            page.figure(
                "Learning rate",
                "How large a step the optimizer takes: it warms up from zero, then decays.",
                "it is flat at zero, or does not match the schedule in the configuration.",
                plots.curves([Line("", lr)], description="Learning rate over steps", start_at_zero=True, height=2.1),
                table=_curve_table({"learning rate": lr}),
            )
        )
    speed = run.metrics.get("train/tokens_per_second")
    if speed is not None and len(speed.finite.value):
        figures.append(
            page.figure(
                "Speed",
                "Tokens processed per second; the dark line is the moving average.",
                "it sinks over time: something leaks, or data loading cannot keep up.",
                plots.curves(
                    [Line("logged", speed, look="raw"), Line("smoothed", smooth(speed))],
                    unit="short",
                    description="Tokens per second over steps",
                    start_at_zero=True,
                    height=2.1,
                ),
                table=_curve_table({"tokens per second": smooth(speed)}),
            )
        )
    body = (
        f'<div class="grid">{"".join(figures)}</div>'
        if figures
        else page.note(_why(run, "metrics.csv", "No loss was logged."))
    )
    if figures and "metrics.csv" in run.notes:
        body = page.note(run.notes["metrics.csv"]) + body
    return page.section("losses", "Losses", lead, body)


def tasks(run: RunFolder) -> list[str]:
    """Names of the tasks with a logged loss, translation first; "" stands for the total where no task has one."""
    found: dict[str, None] = {}
    for column in run.metrics:
        parts = column.split("/")
        if len(parts) == 3 and parts[0] in ("train", "valid") and parts[2] == "loss":
            found[parts[1]] = None
    if not found:
        return [""] if {"train/loss", "valid/loss"} & set(run.metrics) else []
    order = list(TASKS)
    return sorted(found, key=lambda t: (order.index(t) if t in order else len(order), t))


def languages(run: RunFolder) -> list[str]:
    """The run's languages in its own order; [] where it does not say."""
    given = run.routing.get("languages") or dig(run.summary, "data", "languages")
    return [str(x) for x in given] if isinstance(given, list) else []


def scores(run: RunFolder) -> str:
    """BLEU and chrF by direction, as bars and matrices, and how they grew; the perplexity of other runs."""
    if not run.translates:
        return perplexity.scores(run)
    lead = (
        "BLEU counts words and phrases a translation shares with the reference, chrF letters; both run from 0 to 100, "
        "and chrF is the kinder one to rich morphology."
    )
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    names = sorted(
        {*bleu.directions, *chrf.directions}, key=lambda d: -bleu.directions.get(d, chrf.directions.get(d, 0.0))
    )
    if not names:
        why = f"No translation was scored yet: the command test does it. {run.notes.get('summary.json', '')}"
        return page.section("scores", "Translation quality", lead, page.note(why))
    bars = page.figure(
        "BLEU and chrF by direction",
        "One row for each direction, best first: bars are BLEU, dots chrF.",
        "a few directions lag far behind: they may have too little data or weight in the mixture.",
        plots.score_bars(
            names,
            [bleu.directions.get(n, math.nan) for n in names],
            [chrf.directions.get(n, math.nan) for n in names],
            labels=("BLEU", "chrF"),
            description=f"BLEU and chrF of {len(names)} directions; the numbers are in the table below",
        ),
        table=page.table(
            ["direction", "BLEU", "chrF"],
            [(n, wording.fixed(bleu.directions.get(n)), wording.fixed(chrf.directions.get(n))) for n in names],
        ),
    )
    left = bars + _growth(run)
    right = "".join(_matrix(*x, languages(run)) for x in (("BLEU", bleu), ("chrF", chrf)) if x[1].directions)
    figures = [f'<div class="stack">{part}</div>' for part in (left, right)]
    signed = [f"{n}: <code>{text(s.signature)}</code>" for n, s in (("BLEU", bleu), ("chrF", chrf)) if s.signature]
    remarks = ["These are scores of the last validation, not of the test set."] if bleu.origin == "valid" else []
    remarks += [f"Signatures: {', '.join(signed)}."] if signed else []
    end = f'<p class="signatures">{" ".join(remarks)}</p>' if remarks else ""
    return page.section("scores", "Translation quality", lead, f'<div class="grid">{"".join(figures)}</div>{end}')


def _accuracy(run: RunFolder) -> list[str]:
    """One panel with the accuracy of every task: the validation's, or training's where there is none."""
    found: dict[str, Series] = {}
    for task in tasks(run):
        valid, train = (run.metrics.get(f"{phase}/{task}/accuracy") for phase in ("valid", "train"))
        if valid is not None and len(valid.finite.value):
            found[task] = valid
        elif train is not None and len(train.finite.value):
            found[task] = smooth(train)
    if not found:
        return []
    lines = [
        Line(
            TASKS.get(task, task),
            series,
            (*CYCLE, "ink", "muted")[i % 6],
            "points" if len(series.value) < 60 else "line",
        )
        for i, (task, series) in enumerate(found.items())
    ]
    drawing = plots.curves(lines, unit="percent", description="Accuracy of every task over steps", start_at_zero=True)
    return [
        page.figure(
            "Accuracy",
            "Share of predictions that hit the right token, on held-out text where it was measured.",
            "a task stays at chance: its weight may be too small, or its data too hard.",
            drawing,
            table=_curve_table({TASKS.get(task, task): series for task, series in found.items()}),
        )
    ]


def _about(run: RunFolder) -> str:
    """Data, languages and experts in one line."""
    parts = [str(dig(run.summary, "data", "source") or "")]
    spoken = languages(run)
    if spoken:
        parts.append(f"{wording.count(len(spoken), 'language')} ({', '.join(spoken)})")
    sizes = sorted({len(loads(layer)) for layer in run.layers})
    if sizes:
        layers = wording.count(len(run.layers), "Mixture-of-Experts layer")
        parts.append(f"{layers} of {' or '.join(map(str, sizes))} experts")
    return " · ".join(filter(None, parts)) or run.path.resolve().name


def _loss_figure(task: str, metrics: Mapping[str, Series]) -> str:
    middle = f"{task}/" if task else ""
    train, valid = metrics.get(f"train/{middle}loss"), metrics.get(f"valid/{middle}loss")
    lines = []
    window = 1
    if train is not None:
        window = smoothing_window(len(train.finite.value))
        lines += (
            [Line("training", train, look="raw"), Line(f"average of {window}", smooth(train))]
            if window > 1
            else [Line("training", train)]
        )
    if valid is not None:
        lines.append(Line("validation", valid, "red", "points"))
    title = TASKS.get(task, task.replace("_", " ").capitalize()) or "Total"
    columns = {k: v for k, v in (("train (smoothed)", smooth(train) if train else None), ("validation", valid)) if v}
    return page.figure(
        title,
        EXPLAINED.get(task, "Loss of this task."),
        "",
        plots.curves(lines, description=f"{title}: training and validation loss over steps", skip_start=True),
        table=_curve_table(columns),
    )


def _curve_table(columns: Mapping[str, Series]) -> str:
    at = {name: dict(zip(s.step.tolist(), s.value.tolist(), strict=True)) for name, s in columns.items()}
    sparse = [s for s in columns.values() if len(s.step)]
    steps = milestones(sorted(sparse, key=lambda s: len(s.step))[:1])
    return page.table(
        ["step", *columns],
        [(f"{step:,.0f}", *(wording.significant(_near(at[name], step)) for name in columns)) for step in steps],
    )


def _near(values: Mapping[float, float], step: float) -> float | None:
    """The value at `step`, else the one logged closest to it."""
    return values[min(values, key=lambda s: abs(s - step))] if values else None


def _matrix(title: str, found: Scores, order: Sequence[str]) -> str:
    pairs = {sides(d): v for d, v in found.directions.items() if "-" in d}
    spoken = sorted(
        {x for pair in pairs for x in pair}, key=lambda x: (order.index(x) if x in order else len(order), x)
    )
    sources, targets = ([x for x in spoken if any(pair[side] == x for pair in pairs)] for side in (0, 1))
    low, high = min(found.directions.values()), max(found.directions.values())
    pivots = [x for x in spoken if all(x in p for p in pairs)]
    if pairs and len(spoken) > 6 and pivots:
        pivot = pivots[0]
        others = [x for x in spoken if x != pivot]
        columns = [f"into {pivot}", f"from {pivot}"]
        values = [[pairs.get((x, pivot)), pairs.get((pivot, x))] for x in others]
        rows, corner, least = others, "language", "0"
        see = f"Every direction has {pivot} on one side, so the map has two columns: into {pivot} and out of it."
    elif pairs:
        columns, rows, corner = targets, sources, "from \\ to"
        values = [[pairs.get((s, t)) for t in targets] for s in sources]
        least = f"{3 + 2.4 * len(targets):.1f}rem"
        see = "Source languages are rows, target languages are columns; the scale runs from the worst to the best."
    else:
        return ""
    cells = [
        (name, [(sequential_class(v, low, high), wording.fixed(v) if v is not None else "") for v in line])
        for name, line in zip(rows, values, strict=True)
    ]
    legend = page.scale([f"s{i}" for i in range(SEQUENTIAL_LEVELS)], wording.fixed(low), wording.fixed(high))
    html = f'<div class="scroll" style="--least:{least}">{page.heat(corner, columns, cells, kind="matrix")}</div>'
    return page.figure(
        f"{title} from every language into every other",
        see,
        "a whole row (a source that is not understood) or column (a target that is not mastered) is low.",
        html + legend,
    )


def _growth(run: RunFolder) -> str:
    found = {n.removeprefix("valid/bleu/"): s for n, s in run.metrics.items() if n.startswith("valid/bleu/")}
    average = found.pop("average", None)
    if average is None or len(average.finite.value) < 2:
        return ""
    lines = [Line("one direction" if i == 0 else "", s, "muted", "faint") for i, s in enumerate(found.values())]
    return page.figure(
        "Validation BLEU during training",
        "The blue line is the average, each grey line one direction.",
        "the lines are still steep at the end (train longer) or fall (overfitting).",
        plots.curves(
            [*lines, Line("average", average, "blue", "points")],
            description="Validation BLEU over steps",
            start_at_zero=True,
        ),
        table=_curve_table({"average BLEU": average}),
    )


def _why(run: RunFolder, file: str, otherwise: str) -> str:
    return run.notes.get(file, otherwise)
