"""Sections on what was logged over steps: losses, accuracy, learning rate, speed, and how routing fared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moekit.report import wording
from moekit.report.health import by_rule
from moekit.report.plots import Curves, Line, Unit
from moekit.report.recall import floor_lines, floor_words, floors
from moekit.report.run_folder import RunFolder, Series, number
from moekit.report.series import milestones, smooth, smoothing_window
from moekit.report.style import CYCLE
from moekit.report.view import Figure, PageSection, Table, caption, heading, texts

_LOADS = ("dead_experts", "load_cv", "load_max_ratio")  # no cause for worry where a fixed rule decides
_FROM_ZERO = ("drop_rate", "dead_experts", "load_cv", "entropy", "expert_gradient_norm")
_UNITS: Mapping[str, Unit] = {"drop_rate": "percent", "dead_experts": "count"}
_ORDERS = 1e3  # of a norm that jumps so far a linear scale would show the jump alone
_SIDE_COLOURS = {"decoder": "red", "encoder": "blue"}
_PHASES = ("train", "valid", "test")


def curve_table(columns: Mapping[str, Series], say: Callable[[float | None], str] = wording.significant) -> Table:
    """A few steps of series: those of the series with the fewest, and of the others what was logged closest."""
    columns = {name: series for name, series in columns.items() if len(series.step)}
    steps = milestones(sorted(columns.values(), key=lambda s: len(s.step))[:1])
    rows = [
        (f"{step:,.0f}", *(say(float(s.value[np.abs(s.step - step).argmin()])) for s in columns.values()))
        for step in steps
    ]
    return Table(["step", *columns], rows)


def losses(run: RunFolder) -> PageSection:
    """Losses by task, their accuracy, learning rate, speed and gradient norm."""
    figures = [_loss(run, task) for task in _tasks(run)] + _accuracy(run)
    rate = run.learning_rate
    if rate is not None:
        chart = Curves([Line("", rate)], "Learning rate over steps", start_at_zero=True, height=2.1)
        figures.append(
            Figure(*caption("learning_rate"), chart, numbers=curve_table({"learning rate": rate}), name="learning_rate")
        )
    speed = run.logged("train/tokens_per_second")
    if speed is not None:
        lines = [Line("logged", speed, look="raw"), Line("smoothed", smooth(speed))]
        chart = Curves(lines, "Tokens per second over steps", "short", start_at_zero=True, height=2.1)
        numbers = curve_table({"tokens per second": smooth(speed)})
        figures.append(Figure(*caption("speed"), chart, numbers=numbers, name="speed"))
    norm = run.logged("train/grad_norm")
    if norm is not None:
        lines = [Line("logged", norm, look="raw"), Line("smoothed", smooth(norm))]
        shape: Any = {"start_at_zero": True, "skip_start": True, "log_beyond": _ORDERS, "height": 2.1}
        chart = Curves(lines, "Gradient norm over steps", **shape)
        figures.append(
            Figure(*caption("grad_norm"), chart, numbers=curve_table({"gradient norm": smooth(norm)}), name="grad_norm")
        )
    note = run.notes.get("metrics.csv", "" if figures else "No loss was logged.")
    return PageSection(*heading("losses"), [note] if note else [], [[figure] for figure in figures])


def _tasks(run: RunFolder) -> list[str]:
    """Names of the tasks with a logged loss, in the record's order; "" stands for the total where no task has one."""
    found = {*run.by_column("train", "loss"), *run.by_column("valid", "loss")}
    if not found:
        return [""] if {"train/loss", "valid/loss"} & set(run.metrics) else []
    return sorted(found, key=run.task_order)


def _loss(run: RunFolder, task: str) -> Figure:
    middle = f"{task}/" if task else ""
    train, valid = (run.metrics.get(f"{phase}/{middle}loss") for phase in ("train", "valid"))
    lines, columns = [], {}
    if train is not None:
        window = smoothing_window(len(train.finite.value))
        smoothed = Line(f"average of {window}", smooth(train))
        lines += [Line("training", train, look="raw"), smoothed] if window > 1 else [Line("training", train)]
        columns["train (smoothed)"] = smooth(train)
    if valid is not None:
        lines.append(Line("validation", valid, "red", "points"))
        columns["validation"] = valid
    levels = floor_lines([run], task, [series for series in (train, valid) if series is not None])
    named = run.task(task)
    chart = Curves([*lines, *levels], f"{named.title}: training and validation loss over steps", skip_start=True)
    known = f" {floor_words()}" if floors(run).get((task, "valid")) else ""
    name = f"loss/{task}" if task else "loss"
    return Figure(named.title, f"{named.explanation}{known}", chart=chart, numbers=curve_table(columns), name=name)


def _accuracy(run: RunFolder) -> list[Figure]:
    """One panel with the accuracy of every task: the validation's, or training's where there is none."""
    found: dict[str, Series] = {}
    for task in _tasks(run):
        if (valid := run.logged(f"valid/{task}/accuracy")) is not None:
            found[run.task(task).title] = valid
        elif (train := run.logged(f"train/{task}/accuracy")) is not None:
            found[run.task(task).title] = smooth(train)
    if not found:
        return []
    colours = (*CYCLE, "ink", "muted")
    lines = [
        Line(title, series, colours[i % len(colours)], "points" if len(series.value) < 60 else "line")
        for i, (title, series) in enumerate(found.items())
    ]
    for task in _tasks(run):  # beside each what always the most frequent answer would get
        share, title = number(run.summary, "majority", task), run.task(task).title
        if title in found and share is not None:
            level = Series(found[title].step[[0, -1]], np.full(2, share))
            colour = colours[[*found].index(title) % len(colours)]
            label = "" if any(line.look == "faint" for line in lines) else "most frequent answer"
            lines.append(Line(label, level, colour, "faint"))
    chart = Curves(lines, "Accuracy of every task over steps", "percent", start_at_zero=True)
    return [Figure(*caption("accuracy"), chart, numbers=curve_table(found), name="accuracy")]


def routing_curves(metrics: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """The routing columns of metrics.csv by quantity and layer, whatever path they were logged under; "" is overall.

    ``train/routing/drop_rate`` is overall; ``train/routing/encoder.1/drop_rate`` and
    ``encoder.layers.1.feed_forward.router/entropy`` belong to a layer. Training columns win over validation's.
    """
    quantities = texts()["routing"]
    found: dict[str, dict[str, Series]] = {}
    for column in sorted(metrics, key=_phase):
        *scope, quantity = column.split("/")
        if quantity in quantities:
            layer = "/".join(s for s in scope if s not in (*_PHASES, "routing", "router", "moe", "aux"))
            found.setdefault(quantity, {}).setdefault(layer, metrics[column])
    return {quantity: dict(sorted(found[quantity].items())) for quantity in quantities if quantity in found}


def _phase(column: str) -> int:
    phase = column.partition("/")[0]
    return _PHASES.index(phase) if phase in _PHASES else 0


def routing(run: RunFolder) -> PageSection | None:
    """Entropy, drops, dead experts and router losses over time; nothing for a dense model."""
    figures = []
    for quantity, columns in routing_curves(run.metrics).items():
        overall = columns.pop("", None)
        lines: list[Line] = []
        for layer, series in columns.items():
            side = next((side for side in _SIDE_COLOURS if side in layer), "layers")
            label = "" if side in [line.label for line in lines] else side
            lines.append(Line(label, smooth(series), _SIDE_COLOURS.get(side, "muted"), "faint"))
        if overall is not None:
            lines.append(Line("overall" if columns else "", smooth(overall), "ink"))
            columns = {"overall": overall, **columns}
        if not any(len(line.series.value) for line in lines):
            continue
        words = caption(quantity, group="routing", worry=not (by_rule(run) and quantity in _LOADS))
        unit = _UNITS.get(quantity, "plain")
        chart = Curves(lines, f"{words[0]} over steps", unit, start_at_zero=quantity in _FROM_ZERO, height=2.2)
        figures.append(Figure(*words, chart, numbers=curve_table(columns), name=quantity))
    if not figures and run.dense:
        return None
    why = run.notes.get("metrics.csv", "No routing statistics were logged during this run.")
    return PageSection(*heading("routing"), [] if figures else [why], [[figure] for figure in figures])
