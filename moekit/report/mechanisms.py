"""Mechanisms of routing as figures of Matplotlib and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from moekit.mechanisms import LABELS, LayerMechanisms, Mechanisms
from moekit.report import style
from moekit.report.plots import Curves, Line, Unit
from moekit.report.run_folder import Series
from moekit.terminal import visible

_OVER_TIME: Mapping[str, tuple[str, str, Unit]] = {
    "saturation": ("saturation", "Share of choices that are already the last step's", "percent"),
    "active_experts": ("active_experts", "Experts that get a hundredth of a fair share or more", "count"),
    "effective_experts": ("effective_experts", "Effective number of experts, exp of the load's entropy", "plain"),
    "drop_rate": ("drop_rate", "Share of assignments dropped", "percent"),
    "logits": ("logits", "Mean logsumexp of the router's logits", "plain"),
    "gradients": ("gradients", "Mean gradient norm of an expert", "plain"),
}
_HUES = 4  # layers that get a colour of their own
_LARGEST = 64  # experts of a map whose cells can be told apart


def mechanism_figures(found: Mechanisms) -> dict[str, Figure]:
    """Figures of the mechanisms of a trace.

    Returns:
        "saturation", "active_experts", "effective_experts", "drop_rate", "logits" and "gradients": one line a layer
        over the steps, where they are known at two or more. "drops_by_place": drops from the beginning of a batch to
        its end, where any were. "information": mutual information of the expert with language, task and token, by
        layer, where known. "coactivation": the experts that share tokens, for the layer where most do, where tokens
        have several experts.
    """
    figures = {}
    for name, (key, description, unit) in _OVER_TIME.items():
        columns = {layer: getattr(m, key) for layer, m in found.layers.items()}
        known = {layer: values for layer, values in columns.items() if values and _several(values)}
        if any(any(values) for values in known.values()):
            figures[name] = _lines(found.steps, known, description, unit)
    drops = {layer: m.drops_by_place for layer, m in found.layers.items() if any(m.drops_by_place)}
    if drops:
        figures["drops_by_place"] = _drops(drops)
    if any(m.information for m in found.layers.values()):
        figures["information"] = _information(found.layers)
    together = {name: _without_diagonal(m) for name, m in found.layers.items()}
    most = max(together, key=lambda name: float(together[name].max(initial=0.0)), default=None)
    if most is not None and together[most].max(initial=0.0) > 0 and found.layers[most].num_experts <= _LARGEST:
        figures["coactivation"] = _map(most, together[most])
    return figures


def mechanism_table(found: Mechanisms, *, of: str = "") -> Table:
    """A row for each layer: what is known at the last step, and the saturation at the first.

    Args:
        found: the mechanisms.
        of: which routing it is, for the title: "of the test text".
    """
    last, first = found.steps[-1], found.steps[0]
    columns: dict[str, Callable[[LayerMechanisms], str]] = {
        "active": lambda m: f"{m.active_experts[-1]} of {m.num_experts}",
        "effective": lambda m: f"{m.effective_experts[-1]:.1f}",
        "drops": lambda m: _share(m.drop_rate[-1]),
        "by place": lambda m: _bars(m.drops_by_place),
        **{label: partial(_informed, label=label) for label in LABELS},
        "gradient": lambda m: "" if m.gradients[-1] is None else f"{m.gradients[-1]:.2g}",
        "logits": lambda m: "" if m.logits[-1] is None else f"{m.logits[-1]:.2f}",
        f"at {first:,}": lambda m: _share(m.saturation[0]) if m.saturation else "",
    }
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left"
    )
    table.title = " ".join(["Routing", *([of] if of else []), *([f"at step {last:,}"] if last else [])])
    table.add_column("layer", no_wrap=True)
    cells = {name: [said(m) for m in found.layers.values()] for name, said in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in cells:
        table.add_column(name, justify="right")
    for number, name in enumerate(found.layers):
        table.add_row(visible(name), *(column[number] for column in cells.values()))
    notes = []
    if informed := [name for name in LABELS if name in cells]:
        notes.append(f"{', '.join(informed)}: mutual information with the expert, nats above chance")
    if f"at {first:,}" in cells:
        notes.append(f"at {first:,}: share of choices that were the last step's at step {first:,}")
    table.caption = "\n".join(notes) or None
    return table


def _informed(layer: LayerMechanisms, label: str) -> str:
    return _number(layer.information[label].above) if label in layer.information else ""


def _several(values: Sequence[float | None]) -> bool:
    return sum(value is not None for value in values) > 1


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-0.000", "0.000")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bars(values: Sequence[float | None]) -> str:
    """A bar for each tenth of the batch; empty without drops."""
    top = max((value or 0.0 for value in values), default=0.0)
    if not top:
        return ""
    return "".join(" " if v is None else "▁▂▃▄▅▆▇█"[min(7, int(8 * v / top))] for v in values)


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Label and colour of each layer: of many layers all are faint, and only the first and the last are named."""
    if len(names) <= _HUES:
        return {name: (name, style.CYCLE[number]) for number, name in enumerate(names)}
    ends = {names[0]: "blue", names[-1]: "red"}
    return {name: (name if name in ends else "", ends.get(name, "muted")) for name in names}


def _lines(steps: Sequence[int], columns: Mapping[str, Sequence[float | None]], about: str, unit: Unit) -> Figure:
    looks = _looks(list(columns))
    lines = []
    for name, values in columns.items():
        label, colour = looks[name]
        points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        at, value = np.array(points, dtype=np.float64).T
        lines.append(Line(label, Series(at, value), colour, "points" if label else "faint"))
    return Curves(lines, about, unit, start_at_zero=True).figure()


def _drops(columns: Mapping[str, Sequence[float | None]]) -> Figure:
    looks = _looks(list(columns))
    with style.Canvas() as canvas:
        for name, values in columns.items():
            label, colour = looks[name]
            at = [(n + 0.5) / len(values) for n in range(len(values))]
            known = [math.nan if value is None else value for value in values]
            width = 1.5 if label else 0.8
            shown = style.drawable(label) or None
            canvas.axes.plot(at, known, "o-", color=style.COLOURS[colour], label=shown, linewidth=width, markersize=3.2)
        canvas.axes.set_xlim(0, 1)
        canvas.axes.set_ylim(bottom=0)
        canvas.axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g} %")
        canvas.axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
        canvas.axes.set_xlabel("place of the token in its batch")
        canvas.axes.set_title("Share of assignments dropped, by place", fontsize=9)
        canvas.legend()
        return canvas.figure


def _information(layers: Mapping[str, LayerMechanisms]) -> Figure:
    """Bars by layer, beside one another where several labels are known; their scales are the same."""
    known = [what for what in ("language", "task", "token") if any(what in m.information for m in layers.values())]
    with style.Canvas(0.9 + 0.2 * len(known) * max(2, len(layers))) as canvas:
        axes, thick = canvas.axes, 0.8 / len(known)
        for number, what in enumerate(known):
            values = [m.information[what].above if what in m.information else 0.0 for m in layers.values()]
            at = [row + (number - (len(known) - 1) / 2) * thick for row in range(len(layers))]
            axes.barh(at, values, thick * 0.92, color=style.COLOURS[style.CYCLE[number]], label=what)
        axes.set_yticks(range(len(layers)), [style.drawable(name) for name in layers])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel("nats above a shuffled baseline")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_title("What the expert says of the token", fontsize=9)
        canvas.legend()
        return canvas.figure


def _without_diagonal(layer: LayerMechanisms) -> NDArray[np.float64]:
    shares = np.array(layer.coactivation, dtype=np.float64)
    np.fill_diagonal(shares, 0.0)
    return shares


def _map(name: str, shares: NDArray[np.float64]) -> Figure:
    shown = shares.copy()
    np.fill_diagonal(shown, np.nan)
    with style.Canvas(3.6) as canvas:
        colours = LinearSegmentedColormap.from_list("", style.SEQUENTIAL)
        picture = canvas.axes.imshow(shown, colours, vmin=0, vmax=float(shares.max()))
        canvas.axes.set_xlabel("other expert")
        for axis in (canvas.axes.xaxis, canvas.axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        canvas.axes.set_ylabel("expert")
        canvas.axes.grid(visible=False)
        canvas.axes.set_title(style.drawable(f"{name}: share of an expert's tokens that another has too"), fontsize=9)
        bar = canvas.figure.colorbar(picture)
        bar.ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
        return canvas.figure
