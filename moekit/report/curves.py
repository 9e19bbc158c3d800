"""Sections on what was logged over steps: losses, accuracy, learning rate, speed, and how routing fared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moekit.report import wording
from moekit.report.health import layer_health
from moekit.report.plots import Curves, Line, Unit
from moekit.report.run_folder import RunFolder, Series
from moekit.report.series import milestones, smooth, smoothing_window
from moekit.report.style import CYCLE
from moekit.report.tasks import task_order
from moekit.report.view import Figure, Section, Table

_ROUTING: dict[str, tuple[str, str, str]] = {
    "entropy": (
        "Router entropy",
        "How undecided the routers are, in nats: 0 is certainty, log E is a coin with E sides.",
        "it is at log E to the end (nothing was learned) or drops to 0 at once (collapse).",
    ),
    "drop_rate": (
        "Drop rate",
        "Share of assignments that found their expert full and were skipped.",
        "it stays above a tenth: raise the capacity factor or the load-balancing weight.",
    ),
    "dead_experts": (
        "Dead experts",
        "Experts that got next to no token in the logged batches, all layers together.",
        "it is not zero after the first steps: those parameters are wasted.",
    ),
    "load_cv": (
        "Imbalance of load",
        "Standard deviation of the load over experts, divided by its mean; 0 is perfect balance.",
        "it grows: tokens crowd into few experts.",
    ),
    "load_max_ratio": (
        "Busiest expert",
        "Load of the busiest expert in fair shares, averaged over the layers; 1 is perfect balance.",
        "it stays above about 4: that expert is a bottleneck.",
    ),
    "experts_per_token": (
        "Experts per token",
        "How many experts a token used, on average; the fewer, the cheaper.",
        "it stays far from what the configuration aims at.",
    ),
    "load_balance": (
        "Load-balancing loss",
        "1 means tokens are spread evenly, the number of experts means that one takes all.",
        "it climbs away from 1.",
    ),
    "router_z": (
        "Router z-loss",
        "How large the routers' logits are; the penalty keeps them small and training stable.",
        "it grows without bound.",
    ),
}
_LOADS = ("dead_experts", "load_cv", "load_max_ratio")  # no cause for worry where a fixed rule decides
_FROM_ZERO = ("drop_rate", "dead_experts", "load_cv", "entropy")
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


def losses(run: RunFolder) -> Section:
    """Losses by task, their accuracy, learning rate and speed."""
    lead = (
        "A loss says how surprised the model is by the right answer, in nats per predicted token; lower is better, and "
        "it should fall quickly, then slowly. Blue is training, orange held-out sentences. Worry if orange rises while "
        "blue falls (overfitting), or if either jumps or stays flat from the start. Neither counts label "
        "smoothing or the weights of tasks."
    )
    figures = [_loss(run, task) for task in _tasks(run)] + _accuracy(run)
    rates = ("lr", "train/lr", "learning_rate", "train/learning_rate")
    rate = _logged(run, next((n for n in run.metrics if n in rates or n.startswith("lr-")), ""))
    if rate is not None:
        figures.append(
            Figure(
                "Learning rate",
                "How large a step the optimizer takes: it warms up from zero, then decays.",
                "it is flat at zero, or does not match the schedule in the configuration.",
                Curves([Line("", rate)], "Learning rate over steps", start_at_zero=True, height=2.1),
                numbers=curve_table({"learning rate": rate}),
            )
        )
    speed = _logged(run, "train/tokens_per_second")
    if speed is not None:
        lines = [Line("logged", speed, look="raw"), Line("smoothed", smooth(speed))]
        figures.append(
            Figure(
                "Speed",
                "Tokens processed per second; the dark line is the moving average.",
                "it sinks over time: something leaks, or data loading cannot keep up.",
                Curves(lines, "Tokens per second over steps", "short", start_at_zero=True, height=2.1),
                numbers=curve_table({"tokens per second": smooth(speed)}),
            )
        )
    note = run.notes.get("metrics.csv", "" if figures else "No loss was logged.")
    return Section("losses", "Losses", "Losses", lead, [note] if note else [], [[figure] for figure in figures])


def _tasks(run: RunFolder) -> list[str]:
    """Names of the tasks with a logged loss, in the record's order; "" stands for the total where no task has one."""
    columns = [c.split("/") for c in run.metrics]
    found = {c[1] for c in columns if len(c) == 3 and c[0] in ("train", "valid") and c[2] == "loss"}
    if not found:
        return [""] if {"train/loss", "valid/loss"} & set(run.metrics) else []
    return sorted(found, key=lambda task: task_order(run.summary, task))


def _logged(run: RunFolder, column: str) -> Series | None:
    """A column that holds a finite number."""
    series = run.metrics.get(column)
    return series if series is not None and len(series.finite.value) else None


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
    named = run.task(task)
    return Figure(
        named.title,
        named.explanation,
        chart=Curves(lines, f"{named.title}: training and validation loss over steps", skip_start=True),
        numbers=curve_table(columns),
    )


def _accuracy(run: RunFolder) -> list[Figure]:
    """One panel with the accuracy of every task: the validation's, or training's where there is none."""
    found: dict[str, Series] = {}
    for task in _tasks(run):
        valid, train = (_logged(run, f"{phase}/{task}/accuracy") for phase in ("valid", "train"))
        if valid is not None:
            found[run.task(task).title] = valid
        elif train is not None:
            found[run.task(task).title] = smooth(train)
    if not found:
        return []
    colours = (*CYCLE, "ink", "muted")
    lines = [
        Line(title, series, colours[i % len(colours)], "points" if len(series.value) < 60 else "line")
        for i, (title, series) in enumerate(found.items())
    ]
    return [
        Figure(
            "Accuracy",
            "Share of predictions that hit the right token, on held-out text where it was measured.",
            "a task stays at chance: its weight may be too small, or its data too hard.",
            Curves(lines, "Accuracy of every task over steps", "percent", start_at_zero=True),
            numbers=curve_table(found),
        )
    ]


@dataclass(frozen=True)
class RoutingCurve:
    """A routing quantity over steps: overall, and of every layer that logs it."""

    quantity: str
    overall: Series | None
    layers: Mapping[str, Series]


def routing_curves(metrics: Mapping[str, Series]) -> list[RoutingCurve]:
    """The routing columns of metrics.csv, whatever path they were logged under.

    ``train/routing/drop_rate`` is overall; ``train/routing/encoder.1/drop_rate`` and
    ``encoder.layers.1.feed_forward.router/entropy`` belong to a layer. Training columns win over validation's.
    """
    found: dict[str, dict[str, tuple[int, Series]]] = {}
    for column, series in metrics.items():
        *scope, quantity = column.split("/")
        if quantity not in _ROUTING:
            continue
        rank = _PHASES.index(scope[0]) if scope and scope[0] in _PHASES else 0
        name = "/".join(s for s in scope if s not in (*_PHASES, "routing", "router", "moe", "aux"))
        layers = found.setdefault(quantity, {})
        if name not in layers or rank < layers[name][0]:
            layers[name] = (rank, series)
    curves = {q: {name: series for name, (_, series) in sorted(found[q].items())} for q in _ROUTING if q in found}
    return [RoutingCurve(q, layers.pop("", None), layers) for q, layers in curves.items()]


def routing(run: RunFolder) -> Section | None:
    """Entropy, drops, dead experts and router losses over time; nothing for a dense model."""
    lead = (
        "How routing fared during training. Thin lines are single layers (blue encoder, orange decoder), the strong "
        "one is all of them."
    )
    health = layer_health(run)
    by_rule = bool(health) and all(x.fixed for x in health)
    figures = []
    for curve in routing_curves(run.metrics):
        title, see, worry = _ROUTING[curve.quantity]
        lines: list[Line] = []
        for name, series in curve.layers.items():
            side = "decoder" if "decoder" in name else "encoder" if "encoder" in name else "layers"
            label = "" if side in [line.label for line in lines] else side
            colour = {"decoder": "red", "encoder": "blue"}.get(side, "muted")
            lines.append(Line(label, smooth(series), colour, "faint"))
        if curve.overall is not None:
            lines.append(Line("overall" if curve.layers else "", smooth(curve.overall), "ink"))
        if not any(len(line.series.value) for line in lines):
            continue
        unit: Unit = "percent" if curve.quantity == "drop_rate" else "plain"
        zero = curve.quantity in _FROM_ZERO
        columns = {**({} if curve.overall is None else {"overall": curve.overall}), **curve.layers}
        figures.append(
            Figure(
                title,
                see,
                "" if by_rule and curve.quantity in _LOADS else worry,
                Curves(lines, f"{title} over steps", unit, start_at_zero=zero, height=2.2),
                numbers=curve_table(columns),
            )
        )
    if not figures and run.dense:
        return None
    why = run.notes.get("metrics.csv", "No routing statistics were logged during this run.")
    notes = [] if figures else [why]
    return Section("routing", "Routing", "Routing over time", lead, notes, [[figure] for figure in figures])
