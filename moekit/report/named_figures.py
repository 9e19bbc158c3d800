"""`figure`: every drawing of a report as a figure of Matplotlib, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import lightning as L
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moekit.errors import UserError, nearest
from moekit.report.own_module import RoutingReport, figures
from moekit.report.reading import read_run
from moekit.report.run import run_view
from moekit.report.run_folder import RunFolder
from moekit.report.style import COLOURS, Canvas, drawable, shade
from moekit.report.view import Figure as Shown
from moekit.report.view import Heat
from moekit.routing import Routing
from moekit.runs.run import Run
from moekit.training.callbacks.routing_monitor import RoutingMonitor
from moekit.training.metrics import RoutingStatistics

_CELL = 0.21  # inches
_NUMBERS = 16  # columns: with more, numbers do not fit into the cells


def figure(name: str, of: Any) -> Figure:
    """One figure of a report; the last value of a notebook's cell shows itself.

    Args:
        name: what it shows, see `figure_names`: of a run ``load``, ``loss/causal_lm``, ``drop_rate``, ...; of a module
            ``load``, and over steps ``drop_rate`` and ``entropy``.
        of: a run (its folder, or a `moekit.runs.Run`); or what `moekit.report.figures` takes: a `Routing`, or those of
            several layers, by step or not, or a `RoutingStatistics` that has counted; or a `RoutingReport` or
            `RoutingMonitor` that did; or the LightningModule of a Trainer that has one of these two.

    Raises:
        UserError: there is no figure of this name, which then lists those that there are; no run folder; or nothing of
            which there are figures.

    Example:
        >>> import torch, moekit as mk
        >>> moe = mk.MoELayer(mk.routers.switch(8, 4), mk.experts.GroupedMLP(4, 8, 16))
        >>> load = figure("load", moe(torch.randn(32, 8)).routing)
    """
    found = _figures(of)
    if name not in found:
        raise UserError(f"{_called(of)} has no figure {name!r}. {nearest(name, found)}")
    return found[name]()


def figure_names(of: Any) -> list[str]:
    """The names that `figure` knows of a run or a module.

    Raises:
        UserError: no run folder, or nothing of which there are figures.
    """
    return list(_figures(of))


def _figures(of: Any) -> Mapping[str, Callable[[], Figure]]:
    if isinstance(of, str | PathLike | Run | RunFolder):
        run = of if isinstance(of, RunFolder) else read_run(Path(of.path if isinstance(of, Run) else of))
        return {shown.name: _drawer(shown) for shown in _shown(run)}
    counted = _counted(of)
    return {name: lambda drawn=drawn: drawn for name, drawn in figures(counted).items()}  # type: ignore[misc]


def _shown(run: RunFolder) -> Iterator[Shown]:
    for section in run_view(run).sections:
        for cell in section.cells:
            yield from (shown for shown in cell if shown.name)


def _drawer(shown: Shown) -> Callable[[], Figure]:
    if shown.chart is not None:
        chart = shown.chart
        return lambda: chart.figure(shown.title)
    return lambda: _heats(shown.heats, shown.title)


def _counted(of: Any) -> Any:
    """What `figures` takes."""
    if isinstance(of, L.LightningModule):
        callbacks = [] if of._trainer is None else of._trainer.callbacks  # type: ignore[attr-defined]
        known = [one for one in callbacks if isinstance(one, RoutingMonitor | RoutingReport)]
        if not known:
            raise UserError(
                f"figures of {type(of).__name__} need somebody who counts what its layers return: got a module whose "
                "Trainer has no RoutingMonitor and no RoutingReport. Add callbacks=[moekit.training.RoutingMonitor()]."
            )
        of = known[0]
    if isinstance(of, RoutingMonitor | RoutingReport):
        statistics = (of.watch and of.watch.statistics) if isinstance(of, RoutingMonitor) else of.statistics
        if statistics is None:
            raise UserError(f"{type(of).__name__} has figures after it has counted: train some steps first.")
        return statistics
    if isinstance(of, Routing | RoutingStatistics | Mapping | Sequence):
        return of
    raise UserError(
        f"a figure is of a run folder, a Run, or of routings, statistics or a module: got {type(of).__name__}. For a "
        'module of one\'s own give what its layer returned, as in figure("load", layer(x).routing).'
    )


def _called(of: Any) -> str:
    if isinstance(of, str | PathLike):
        return f"the run {of}"
    return f"the run {of.path}" if isinstance(of, Run | RunFolder) else type(of).__name__


def _heats(heats: Sequence[Heat], title: str) -> Figure:
    """Heat maps one below the other, in the colours of the page by day."""
    with Canvas(0.5 + sum(0.55 + _CELL * len(heat.rows) for heat in heats)) as canvas:
        drawn = canvas.figure
        drawn.delaxes(canvas.axes)
        drawn.suptitle(drawable(title), fontsize=9)
        heights = [2 + len(heat.rows) for heat in heats]
        places = drawn.subplots(len(heats), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, heat in zip(places, heats, strict=True):
            for row, (_, cells) in enumerate(heat.rows):
                for column, (kind, text) in enumerate(cells):
                    if (colours := shade(kind)) is None:
                        continue
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=colours[0], linewidth=0))
                    if len(heat.columns) <= _NUMBERS:
                        look = {"ha": "center", "va": "center", "fontsize": 7, "color": colours[1]}
                        axes.text(column, row, drawable(text), parse_math=False, **look)
            axes.set_xlim(-0.5, len(heat.columns) - 0.5)
            axes.set_ylim(len(heat.rows) - 0.5, -0.5)
            axes.set_yticks(range(len(heat.rows)), [drawable(name) for name, _ in heat.rows])
            ticks = range(0, len(heat.columns), max(1, len(heat.columns) // _NUMBERS))
            axes.set_xticks(ticks, [drawable(heat.columns[n]) for n in ticks])
            axes.set_xlabel(drawable(" ".join(filter(None, (heat.title, heat.remark)))), color=COLOURS["ink"])
            axes.grid(visible=False)
        return drawn
