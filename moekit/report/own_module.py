"""Routing of a module of one's own, without a run folder: figures for a notebook, and a page that a callback writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch.utils.hooks import RemovableHandle

from moekit.errors import UserError
from moekit.layer import moe_layers
from moekit.report import render, style
from moekit.report.curves import routing as over_time
from moekit.report.experts import experts
from moekit.report.health import findings
from moekit.report.plots import Curves, Line
from moekit.report.run_folder import RunFolder, Series
from moekit.report.view import View
from moekit.routing import Routing
from moekit.stepping import in_backward
from moekit.training.metrics.pieces import PieceCounts, typical_pieces
from moekit.training.metrics.routing import RoutingStatistics, learns

Step = Mapping[str, Routing] | Sequence[Routing] | Routing
_SHOWN = {"drop_rate": "Share of assignments dropped", "entropy": "Router entropy in nats"}
_LABELLED = 16  # experts: with more, numbers do not fit into the cells


def figures(
    routings: Step | Mapping[int, Step] | RoutingStatistics,
    *,
    pieces: PieceCounts | None = None,
    named: Callable[[int], str] = str,
) -> dict[str, Figure]:
    """Figures of Matplotlib on what routers did: show them in a notebook, or ``figures(...)["load"].savefig(...)``.

    Args:
        routings: the `Routing` of one layer; those of several layers, by name or in order; for curves, any of these by
            step; or a `moekit.training.metrics.routing.RoutingStatistics` that has counted.
        pieces: a `moekit.training.metrics.PieceCounts` that has counted, for "typical".
        named: gives the text of a piece by its id, as a tokenizer does.

    Returns:
        "load": the load of every expert (columns) of every layer (rows) in fair shares, over all steps together.
        "drop_rate" and "entropy": one line a layer over the steps, where layers have them.
        "typical": the most typical pieces of the vocabulary for every expert, where `pieces` are given.

    Raises:
        UserError: if there is no routing, or the layers differ between steps.

    Example:
        >>> import torch, moekit as mk
        >>> moe = mk.MoELayer(mk.routers.switch(8, 4), mk.experts.GroupedMLP(4, 8, 16))
        >>> sorted(figures({step: moe(torch.randn(32, 8)).routing for step in range(3)}))
        ['drop_rate', 'entropy', 'load']
    """
    liked = {} if pieces is None else {"typical": _typical(pieces, named)}
    if isinstance(routings, RoutingStatistics):
        return _drawn(routings, {}) | liked
    keyed = isinstance(routings, Mapping) and bool(routings) and all(isinstance(key, int) for key in routings)
    steps = {step: _by_name(given) for step, given in (routings.items() if keyed else [(0, routings)])}  # type: ignore[union-attr]
    first = next(iter(steps.values()), {})
    sizes = {name: routing.num_experts for name, routing in first.items()}
    for step, found in steps.items():
        if (here := {name: routing.num_experts for name, routing in found.items()}) != sizes or not sizes:
            raise UserError(
                f"figures needs the routings of the same layers at every step, and at least one: got {here} at step "
                f"{step} and {sizes} before. Give `Routing`s by layer, or by step and layer."
            )
    device = next(iter(first.values())).token.device
    whole, points = RoutingStatistics(sizes).to(device), _Points()
    for step, found in steps.items():
        now = RoutingStatistics(sizes).to(device)
        now.update(found)
        whole.update(found)
        points.add(int(step), now)
    return _drawn(whole, points.series() if keyed else {}) | liked


def _by_name(given: Any) -> dict[str, Routing]:
    if isinstance(given, Routing):
        given = [given]
    if isinstance(given, Sequence):
        given = {f"layer {number}": routing for number, routing in enumerate(given)}
    if not isinstance(given, Mapping) or not all(isinstance(routing, Routing) for routing in given.values()):
        raise UserError(f"figures needs `Routing`s, which sparse layers return: got {type(given).__name__}.")
    return {str(name): routing for name, routing in given.items()}


class _Points:
    """What was measured at each step, as the columns of a run's metrics."""

    def __init__(self) -> None:
        self.columns: dict[str, list[tuple[int, float]]] = {}

    def add(self, step: int, statistics: RoutingStatistics) -> None:
        for name, value in statistics.log_values().items():
            self.columns.setdefault(f"train/{name}", []).append((step, value))

    def series(self) -> dict[str, Series]:
        pairs = {name: np.array(column, dtype=np.float64).T for name, column in self.columns.items()}
        return {name: Series(step, value) for name, (step, value) in pairs.items()}


def _drawn(statistics: RoutingStatistics, metrics: Mapping[str, Series]) -> dict[str, Figure]:
    found = {"load": _load_map(statistics.compute()["layers"])}
    for quantity, description in _SHOWN.items():
        columns = {n: metrics.get(f"train/routing/{n}/{quantity}") for n in statistics.layers}
        lines = [
            Line(name, series, style.CYCLE[number % len(style.CYCLE)], "points" if len(series.step) < 30 else "line")
            for number, (name, series) in enumerate(columns.items())
            if series is not None
        ]
        if lines:
            unit = "percent" if quantity == "drop_rate" else "plain"
            found[quantity] = Curves(lines, description, unit, start_at_zero=True).figure()  # type: ignore[arg-type]
    return found


def _typical(pieces: PieceCounts, named: Callable[[int], str]) -> Figure:
    """A line of text for each expert that likes something."""
    lines = [
        (f"{layer}, expert {expert}", "  ".join(f"{named(piece)} \u00d7{lift:.1f}" for piece, _, lift in found[:5]))
        for layer, counts in pieces.compute().items()
        for expert, found in enumerate(typical_pieces(counts))
        if found
    ]
    with style.Canvas(0.6 + 0.18 * len(lines)) as canvas:
        canvas.axes.set_axis_off()
        canvas.axes.set_title("Typical pieces of the vocabulary", fontsize=9)
        canvas.axes.set_ylim(len(lines), -1)
        for row, (expert, liked) in enumerate(lines):
            canvas.axes.text(0, row, style.drawable(expert), fontsize=7, color=style.COLOURS["ink"], parse_math=False)
            canvas.axes.text(0.3, row, style.drawable(liked), fontsize=7, color=style.COLOURS["ink"], parse_math=False)
        return canvas.figure


def _load_map(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Log-coloured as on the page: a quarter of a fair share and less, and four and more, are the ends."""
    most = max(layer["num_experts"] for layer in layers)
    shares = np.full((len(layers), most), np.nan)
    for row, layer in zip(shares, layers, strict=True):
        row[: layer["num_experts"]] = np.array(layer["load"]) * layer["num_experts"]
    with style.Canvas(1.1 + 0.3 * len(layers)) as canvas:
        colours = LinearSegmentedColormap.from_list("", style.DIVERGING)
        with np.errstate(divide="ignore"):
            picture = canvas.axes.imshow(np.log2(np.maximum(shares, 2**-9)), colours, aspect="auto", vmin=-2, vmax=2)
        canvas.axes.set_yticks(range(len(layers)), [style.drawable(str(layer["name"])) for layer in layers])
        canvas.axes.set_xlabel("expert")
        canvas.axes.set_title("Load in fair shares", fontsize=9)
        canvas.axes.grid(visible=False)
        for (row, expert), share in np.ndenumerate(shares):
            if most <= _LABELLED and math.isfinite(share):
                ink = style.COLOURS["paper" if abs(math.log2(max(share, 2**-9))) > 1.5 else "ink"]
                canvas.axes.text(expert, row, f"{share:.1f}", ha="center", va="center", fontsize=7, color=ink)
        bar = canvas.figure.colorbar(picture, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])
        return canvas.figure


class RoutingReport(Callback):
    """Counts what every `MoELayer` of any LightningModule returns in training, and writes a page at the end.

    ``L.Trainer(callbacks=[moekit.report.RoutingReport("routing.html")])`` is all. Forward hooks read the `Routing` that
    layers return, from the first training batch to the end of training; nothing is kept of a batch but counts on its
    device, which the host reads every `every_n_steps` optimizer steps. Micro-batches of gradient accumulation count
    each, what activation checkpointing computes again does not, neither does validation. Processes are added up, and
    the first one writes. What ran before a resume is not in the page.

    Args:
        path: the page, one file without outside parts; None = ``routing.html`` in the Trainer's ``default_root_dir``.
        every_n_steps: optimizer steps between two points of the curves.
        title: what the page is of; None = the class of the module.

    Attributes:
        statistics: counts of all steps of this process so far; `figures` draws them.

    Raises:
        UserError: if `every_n_steps` is less than 1; in the end, if the page cannot be written.

    Warns:
        UserWarning: if the module has no `MoELayer`: no page is written.
    """

    def __init__(self, path: str | Path | None = None, *, every_n_steps: int = 50, title: str | None = None) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps must be at least 1: got {every_n_steps}.")
        self.path, self.every_n_steps, self.title = path, every_n_steps, title
        self.statistics: RoutingStatistics | None = None
        self._window: RoutingStatistics | None = None  # since the last point
        self._points, self._step = _Points(), 0
        self._counting = False
        self._handles: list[RemovableHandle] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove()
        layers = dict(moe_layers(pl_module))
        self._points, self._step = _Points(), trainer.global_step
        self.statistics = self._window = None
        if not layers:
            L.pytorch.utilities.rank_zero_warn(
                "RoutingReport found no MoELayer in the module: there is nothing to report."
            )
            return
        sizes = {path: layer.num_experts for path, layer in layers.items()}
        fixed = [path for path, layer in layers.items() if not learns(layer)]
        self.statistics, self._window = (RoutingStatistics(sizes, fixed=fixed).to(pl_module.device) for _ in range(2))
        self._handles = [layer.register_forward_hook(self._hear(path)) for path, layer in layers.items()]

    def _hear(self, path: str) -> Any:
        @torch.compiler.disable
        @torch.no_grad()
        def hook(layer: Any, arguments: Any, output: Any) -> None:
            if self._counting and layer.training and not in_backward():
                assert self._window is not None
                self._window.update({path: output.routing})

        return hook

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self._counting = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self._counting = False
        if self._handles and trainer.global_step - self._step >= self.every_n_steps:
            self._point(trainer.global_step)

    def _point(self, step: int) -> None:
        """Close the window; all processes come here together."""
        assert self._window is not None
        assert self.statistics is not None
        for name in self._window._defaults:
            getattr(self.statistics, name).add_(getattr(self._window, name))
        self.statistics._update_count += 1
        self.statistics._computed = None
        self._points.add(step, self._window)
        self._window.reset()
        self._step = step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._handles:
            return
        self._remove()
        if trainer.global_step > self._step:
            self._point(trainer.global_step)
        assert self.statistics is not None
        counted = self.statistics.compute()
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "routing.html" if self.path is None else Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            routing = {**counted, "measured": "Measured in training, all steps together."}
            page = RunFolder(path.parent, metrics=self._points.series(), routing=routing)
            render.save(path, render.html(_view(page, self.title or type(pl_module).__name__, trainer.global_step)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._counting = [], False


def _view(page: RunFolder, name: str, steps: int) -> View:
    sections = [section for section in (experts(page), over_time(page)) if section]
    lead = f"Routing of every sparse layer in {steps:,} optimizer steps of training."
    return View("moekit routing report", name, lead, [], sections, findings(page))
