"""The two kinds of plots that Matplotlib draws: curves over steps, and scores by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from moekit.report.run_folder import Series
from moekit.report.series import limits, thin
from moekit.report.style import COLOURS, Canvas
from moekit.report.wording import perplexity, short

Unit = Literal["plain", "percent", "short"]
MAX_BROKEN_MARKS = 40


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: its name in the legend; "" keeps it out of the legend.
        series: the points, NaN and infinities included (they are marked, not hidden).
        colour: a name of `style.COLOURS`.
        look: "line", "raw" (pale: the unsmoothed values), "points" (a line with a mark at each measurement) or
            "faint" (one of many).
    """

    label: str
    series: Series
    colour: str = "blue"
    look: Literal["line", "raw", "points", "faint"] = "line"


_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8, "zorder": 3},
    "raw": {"linewidth": 0.7, "alpha": 0.3, "zorder": 2},
    "points": {"linewidth": 1.5, "marker": "o", "markersize": 3.2, "zorder": 4},
    "faint": {"linewidth": 0.8, "alpha": 0.55, "zorder": 2},
}


def curves(
    lines: Sequence[Line],
    *,
    unit: Unit = "plain",
    description: str,
    x_label: str = "optimizer step",
    start_at_zero: bool = False,
    skip_start: bool = False,
    height: float = 2.7,
) -> str:
    """Lines over steps as inline SVG.

    Args:
        lines: what to draw; empty ones are left out.
        unit: how the vertical axis is labelled.
        description: for those who cannot see the picture.
        x_label: name of the horizontal axis.
        start_at_zero: whether the vertical axis must contain 0.
        skip_start: cut the first twentieth off at the top where it lies so high that it would squeeze the rest.
        height: in inches.
    """
    with Canvas(height) as canvas:
        axes = canvas.axes
        shown = []
        broken: set[float] = set()
        for line in lines:
            good = line.series.finite
            broken |= set(line.series.step[~np.isfinite(line.series.value)].tolist())
            if not len(good.value):
                continue
            points = thin(good)
            # A lone point has no line: give it a mark whatever its look.
            look = _LOOKS["points" if len(points.value) == 1 else line.look]
            axes.plot(points.step, points.value, color=COLOURS[line.colour], label=line.label or None, **look)
            shown.append(_informative(good.value) if skip_start else good.value)
        for i, step in enumerate(sorted(broken)[:MAX_BROKEN_MARKS]):
            label = "not a number" if i == 0 else None
            axes.axvline(step, color=COLOURS["red"], linewidth=0.8, linestyle=(0, (2, 2)), label=label)
        axes.set_ylim(*limits(np.concatenate(shown or [np.zeros(0)]), start_at_zero=start_at_zero))
        axes.set_xlabel(x_label)
        axes.margins(x=0.012)
        steps = {float(step) for line in lines for step in line.series.step}
        if len(steps) == 1:
            axes.set_xlim(min(steps) - 1, min(steps) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        formatter = _FORMATS[unit]
        if formatter is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(formatter))
        canvas.legend()
        return canvas.svg(description)


def score_bars(
    names: Sequence[str], bars: Sequence[float], dots: Sequence[float], *, labels: tuple[str, str], description: str
) -> str:
    """Horizontal bars with a dot beside each, both on a scale from 0 to 100; NaN draws nothing."""
    with Canvas(0.75 + 0.185 * max(3, len(names))) as canvas:
        axes = canvas.axes
        at = np.arange(len(names))
        axes.barh(at, bars, height=0.62, color=COLOURS["blue"], label=labels[0])
        if any(math.isfinite(d) for d in dots):
            axes.plot(dots, at, "o", color=COLOURS["red"], markersize=4, label=labels[1])
        for i, value in enumerate(bars):
            if math.isfinite(value):
                inside = value > 12
                axes.text(
                    value - 0.8 if inside else value + 0.8,
                    i,
                    f"{value:.1f}",
                    ha="right" if inside else "left",
                    va="center",
                    fontsize=7.5,
                    color=COLOURS["paper"] if inside else COLOURS["ink"],
                )
        top = max([v for v in (*bars, *dots) if math.isfinite(v)], default=100.0)
        axes.set_xlim(0, min(100.0, max(10.0, math.ceil(top / 10) * 10)))
        _name_rows(axes, names)
        canvas.legend(last=labels[1:])
        return canvas.svg(description)


def perplexity_bars(names: Sequence[str], bars: Sequence[float], *, description: str) -> str:
    """Horizontal bars that begin at 1, the best perplexity there is; on a logarithmic scale where they differ a lot."""
    with Canvas(0.75 + 0.185 * max(3, len(names))) as canvas:
        axes = canvas.axes
        at = np.arange(len(names))
        high = max(1.1, *bars)
        logarithmic = _spread(bars)
        axes.barh(at, [max(0.0, value - 1) for value in bars], left=1, height=0.62, color=COLOURS["blue"])
        span = math.log(high) if logarithmic else high - 1
        for i, value in enumerate(bars):
            inside = (math.log(max(value, 1.0)) if logarithmic else value - 1) > 0.15 * span
            axes.annotate(
                perplexity(value),
                (max(value, 1.0), i),
                xytext=(-3 if inside else 3, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                fontsize=7.5,
                color=COLOURS["paper"] if inside else COLOURS["ink"],
            )
        axes.set_xlim(1, high**1.02 if logarithmic else 1 + 1.02 * (high - 1))
        _perplexity_axis(axes, logarithmic=logarithmic)
        _name_rows(axes, names)
        return canvas.svg(description)


def score_dots(names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]], *, description: str) -> str:
    """For each name one dot per run, joined by a rule: who is ahead, and by how much."""
    with Canvas(0.75 + 0.185 * max(3, len(names))) as canvas:
        _dots(canvas.axes, names, columns)
        canvas.legend()
        return canvas.svg(description)


def perplexity_dots(names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]], *, description: str) -> str:
    """`score_dots` for perplexities: on a logarithmic scale where they differ a lot."""
    with Canvas(0.75 + 0.185 * max(3, len(names))) as canvas:
        _dots(canvas.axes, names, columns)
        _perplexity_axis(canvas.axes, logarithmic=_spread([value for _, column in columns for value in column]))
        canvas.legend()
        return canvas.svg(description)


def _dots(axes: Axes, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]]) -> None:
    colours = ("blue", "red", "green", "purple")
    marks = ("o", "D", "s", "^")
    for i in range(len(names)):
        values = [column[i] for _, column in columns if math.isfinite(column[i])]
        if values:
            axes.plot([min(values), max(values)], [i, i], color=COLOURS["rule"], linewidth=2, zorder=1)
    for j, (label, marked) in enumerate(columns):
        axes.plot(
            marked,
            np.arange(len(names)),
            marks[j % len(marks)],
            color=COLOURS[colours[j % len(colours)]],
            markersize=4.5,
            label=label,
            zorder=3,
        )
    _name_rows(axes, names)


def _spread(perplexities: Sequence[float]) -> bool:
    """Whether perplexities differ so much that a linear scale would show the greatest alone."""
    finite = [max(value, 1.0) for value in perplexities if math.isfinite(value)]
    return bool(finite) and max(finite) > 30 * min(finite)


def _perplexity_axis(axes: Axes, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) if x >= 1e4 else f"{x:,.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row for each name from the top down, and rules at the values."""
    axes.set_yticks(np.arange(len(names)), names)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _informative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` without their first twentieth, if that alone would take more than a third of the axis."""
    rest = values[len(values) // 20 :]
    return rest if len(values) >= 40 and np.ptp(values) > 1.5 * np.ptp(rest) else values


_FORMATS: dict[Unit, Callable[[float, object], str] | None] = {
    "plain": None,
    "percent": lambda value, _: f"{100 * value:.4g} %",
    "short": lambda value, _: short(value).replace(".0 ", " ").replace(".00 ", " ") if value else "0",
}
