"""The charts that Matplotlib draws: curves over steps, and scores by name as bars or as dots."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from moekit.report.run_folder import Series
from moekit.report.series import limits, thin
from moekit.report.style import COLOURS, CYCLE, Canvas, drawable
from moekit.report.wording import perplexity, short

Unit = Literal["plain", "percent", "short", "count"]
_LARGE = 1e4  # from here on numbers are shortened
MAX_BROKEN_MARKS = 40
_MARKS = "oDs^vPX*"  # more than there are colours, so that no two of a few look alike


class Drawing:
    """What a chart is to a page and to a notebook.

    Attributes:
        description: for those who cannot see the picture.
    """

    description: str

    def svg(self) -> Markup:
        """The chart as inline SVG."""
        with self._drawn() as canvas:
            return canvas.svg(self.description)

    def figure(self, title: str = "") -> Figure:
        """The chart as a figure of Matplotlib, under `title`, or else its description."""
        with self._drawn() as canvas:
            canvas.axes.set_title(drawable(title or self.description), fontsize=9)
            return canvas.figure

    def _drawn(self) -> contextlib.AbstractContextManager[Canvas]:
        raise NotImplementedError


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: its name in the legend; "" keeps it out of the legend.
        series: the points, NaN and infinities included (they are marked, not hidden).
        colour: a name of `style.COLOURS`.
        look: "line", "raw" (pale: the unsmoothed values), "points" (a line with a mark at each measurement), "faint"
            (one of many) or "level" (dotted: a value to compare with).
    """

    label: str
    series: Series
    colour: str = "blue"
    look: Literal["line", "raw", "points", "faint", "level"] = "line"


_LOOKS: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.8, "zorder": 3},
    "raw": {"linewidth": 0.7, "alpha": 0.3, "zorder": 2},
    "points": {"linewidth": 1.5, "marker": "o", "markersize": 3.2, "zorder": 4},
    "faint": {"linewidth": 0.8, "alpha": 0.55, "zorder": 2},
    "level": {"linewidth": 1.2, "linestyle": ":", "zorder": 2},
}


@dataclass(frozen=True)
class Curves(Drawing):
    """Lines over optimizer steps.

    Attributes:
        lines: what to draw; empty ones are left out.
        description: for those who cannot see the picture.
        unit: how the vertical axis is labelled.
        start_at_zero: whether the vertical axis must contain 0.
        skip_start: cut the first twentieth off at the top where it lies so high that it would squeeze the rest.
        log_beyond: the vertical axis is logarithmic where the greatest value is more than so many times the least
            (0 = never).
        height: inches.
    """

    lines: Sequence[Line]
    description: str
    unit: Unit = "plain"
    start_at_zero: bool = False
    skip_start: bool = False
    log_beyond: float = 0.0
    height: float = 2.7

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[Canvas]:
        with Canvas(self.height) as canvas:
            axes = canvas.axes
            shown = []
            broken: set[float] = set()
            for line in self.lines:
                good = line.series.finite
                broken |= set(line.series.step[~np.isfinite(line.series.value)].tolist())
                if not len(good.value):
                    continue
                points = thin(good)
                # A lone point has no line: give it a mark whatever its look.
                look = _LOOKS["points" if len(points.value) == 1 else line.look]
                label = drawable(line.label) or None
                axes.plot(points.step, points.value, color=COLOURS[line.colour], label=label, **look)
                shown.append(_informative(good.value) if self.skip_start else good.value)
            for i, step in enumerate(sorted(broken)[:MAX_BROKEN_MARKS]):
                label = "not a number" if i == 0 else None
                axes.axvline(step, color=COLOURS["red"], linewidth=0.8, linestyle=(0, (2, 2)), label=label)
            values = np.concatenate(shown or [np.zeros(0)])
            logarithmic = len(values) > 0 and 0 < self.log_beyond * float(values.min()) < float(values.max())
            if logarithmic:
                axes.set_yscale("log")
                axes.set_ylim(values.min() / 1.5, values.max() * 1.5)
            else:
                axes.set_ylim(*limits(values, start_at_zero=self.start_at_zero))
                axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=self.unit == "count"))
            axes.set_xlabel("optimizer step")
            axes.margins(x=0.012)
            steps = {float(step) for line in self.lines for step in line.series.step}
            if len(steps) == 1:
                axes.set_xlim(min(steps) - 1, min(steps) + 1)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            large = len(values) > 0 and np.abs(values).max() >= _LARGE
            if formatter := _FORMATS["short" if large and self.unit == "plain" else self.unit]:
                axes.yaxis.set_major_formatter(formatter)
            canvas.legend()
            yield canvas


@dataclass(frozen=True)
class Bars(Drawing):
    """Horizontal bars by name.

    Scores from 0 to 100, a second score as a dot beside each; or perplexities, which begin at 1, the best there is, on
    a logarithmic scale where they differ a lot. NaN draws nothing.
    """

    names: Sequence[str]
    values: Sequence[float]
    description: str
    dots: Sequence[float] = ()
    labels: tuple[str, str] = ("", "")
    perplexity: bool = False

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[Canvas]:
        with _rows(self.names) as canvas:
            axes = canvas.axes
            finite = [v for v in (*self.values, *self.dots) if math.isfinite(v)]
            if self.perplexity:
                least, high, logarithmic = 1.0, max(1.1, *finite), _spread(self.values)
                axes.set_xlim(1, high**1.02 if logarithmic else 1 + 1.02 * (high - 1))
                _perplexity_axis(axes, logarithmic=logarithmic)
            else:
                least, logarithmic = 0.0, False
                high = min(100.0, max(10.0, math.ceil(max(finite, default=100.0) / 10) * 10))
                axes.set_xlim(0, high)
            height, blue = 0.62, COLOURS["blue"]
            ends = [max(v, least) for v in self.values]
            axes.barh(range(len(ends)), [e - least for e in ends], height, least, color=blue, label=self.labels[0])
            if any(map(math.isfinite, self.dots)):
                look: dict[str, Any] = {"color": COLOURS["red"], "markersize": 4, "label": self.labels[1]}
                axes.plot(self.dots, range(len(ends)), "o", clip_on=False, **look)
            for i, end in enumerate(ends):
                if not math.isfinite(end):
                    continue
                said = perplexity(self.values[i]) if self.perplexity else f"{end:.1f}"
                share = math.log(end) / math.log(high) if logarithmic else (end - least) / (high - least)
                side, shift, colour = ("right", -3, "paper") if share > 0.15 else ("left", 3, "ink")
                look = {"ha": side, "va": "center", "fontsize": 7.5, "color": COLOURS[colour]}
                axes.annotate(said, (end, i), xytext=(shift, 0), textcoords="offset points", **look)
            canvas.legend(last=self.labels[1:])
            yield canvas


@dataclass(frozen=True)
class Dots(Drawing):
    """For each name one dot per run, joined by a rule: who is ahead, and by how much.

    With `levels`, by name, the numbers are shares of 1, and a dotted line stands at each level.
    """

    names: Sequence[str]
    columns: Mapping[str, Sequence[float]]
    description: str
    perplexity: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[Canvas]:
        with _rows(self.names) as canvas:
            axes = canvas.axes
            for i in range(len(self.names)):
                values = [column[i] for column in self.columns.values() if math.isfinite(column[i])]
                if values:
                    axes.plot([min(values), max(values)], [i, i], color=COLOURS["rule"], linewidth=2, zorder=1)
            for j, (label, column) in enumerate(self.columns.items()):
                colour, mark = COLOURS[CYCLE[j % len(CYCLE)]], _MARKS[j % len(_MARKS)]
                at = range(len(self.names))
                axes.plot(column, at, mark, color=colour, markersize=4.5, label=drawable(label), zorder=3)
            if self.perplexity:
                _perplexity_axis(axes, logarithmic=_spread([v for column in self.columns.values() for v in column]))
            for label, level in self.levels.items():
                axes.axvline(level, color=COLOURS["ink"], label=drawable(label), **_LOOKS["level"])
            if self.levels and (formatter := _FORMATS["percent"]):
                axes.set_xlim(0, 1.02)
                axes.xaxis.set_major_formatter(formatter)
            canvas.legend()
            yield canvas


@dataclass(frozen=True)
class Shares(Drawing):
    """Shares of 1 over classes that have an order, one line for each of several groups; NaN draws nothing.

    Attributes:
        names: what the classes are called.
        lines: Float[classes] by name of the group.
        description: for those who cannot see the picture.
        levels: shares to compare with, by name: dotted lines.
        axis: what the classes are.
    """

    names: Sequence[str]
    lines: Mapping[str, Sequence[float]]
    description: str
    levels: Mapping[str, float] = field(default_factory=dict)
    axis: str = ""

    @contextlib.contextmanager
    def _drawn(self) -> Iterator[Canvas]:
        with Canvas(2.7) as canvas:
            axes, places = canvas.axes, range(len(self.names))
            for number, (label, line) in enumerate(self.lines.items()):
                colour, look = COLOURS[CYCLE[number % len(CYCLE)]], _LOOKS["points"]
                axes.plot(places[: len(line)], line, color=colour, label=drawable(label), **look)
            for label, level in self.levels.items():
                axes.axhline(level, color=COLOURS["ink"], label=drawable(label), **_LOOKS["level"])
            axes.set_ylim(0, 1.02)
            axes.set_xticks(places, [*map(drawable, self.names)])
            axes.set_xlabel(drawable(self.axis))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            if formatter := _FORMATS["percent"]:
                axes.yaxis.set_major_formatter(formatter)
            canvas.legend()
            yield canvas


Chart = Curves | Bars | Dots | Shares


@contextlib.contextmanager
def _rows(names: Sequence[str]) -> Iterator[Canvas]:
    """A canvas with one row for each name from the top down, and rules at the values."""
    with Canvas(0.75 + 0.185 * max(3, len(names))) as canvas:
        axes = canvas.axes
        axes.set_yticks(range(len(names)), [*map(drawable, names)])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
        yield canvas


def _spread(perplexities: Sequence[float]) -> bool:
    """Whether perplexities differ so much that a linear scale would show the greatest alone."""
    finite = [max(value, 1.0) for value in perplexities if math.isfinite(value)]
    return bool(finite) and max(finite) > 30 * min(finite)


def _perplexity_axis(axes: Axes, *, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 1e4 else f"{x:,.4g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _informative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` without their first twentieth, if that alone would take more than a third of the axis."""
    rest = values[len(values) // 20 :]
    return rest if len(values) >= 40 and np.ptp(values) > 1.5 * np.ptp(rest) else values


_FORMATS: dict[Unit, Callable[[float, object], str] | None] = {
    "plain": None,
    "count": lambda value, _: f"{value:,.0f}",
    "percent": lambda value, _: f"{100 * value:.4g} %",
    "short": lambda value, _: short(value).replace(".0 ", " ").replace(".00 ", " ") if value else "0",
}
