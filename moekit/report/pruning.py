"""The curve of quality against size: its points, a table and a drawing, as files."""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Callable
from pathlib import Path

from moekit.atomic import replacing, write_json, write_text
from moekit.errors import UserError
from moekit.report.style import COLOURS, CYCLE, Canvas
from moekit.runs.surgery.curve import LABELS, Curve, Point, table


def write_curve(curve: Curve, out: str | Path) -> None:
    """Write pruning.json (every point), pruning.md (a table) and pruning.svg into a folder.

    Raises:
        UserError: if they cannot be written.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder: {folder} is a file.")
    drawing = _drawing(curve)
    write_json(folder / "pruning.json", dataclasses.asdict(curve))
    write_text(folder / "pruning.md", table(curve))
    with replacing(folder / "pruning.svg") as file:
        file.write(drawing)


def _drawing(curve: Curve) -> bytes:
    """Loss against parameters; every random draw is a faint mark."""
    with Canvas(3.0) as canvas:
        axes = canvas.axes
        for colour, (order, label) in zip(CYCLE, LABELS.items(), strict=False):
            if not (here := [point for point in curve.points if point.order == order]):
                continue
            values: list[tuple[str, Callable[[Point], float | None], str]] = [("", lambda p: p.loss, "-")]
            if curve.recovery is not None:
                values.append((", trained on", lambda p: p.recovered, "--"))
            for suffix, value, style in values:
                start = value(curve.whole)
                means = [] if start is None else [(curve.whole.parameters, start)]
                for keep in dict.fromkeys(point.keep for point in here):
                    found = [(point.parameters, value(point)) for point in here if point.keep == keep]
                    known = [(size, y) for size, y in found if y is not None]
                    if not known:
                        continue
                    means.append((known[0][0], statistics.fmean(y for _, y in known)))
                    if len(known) > 1:
                        axes.plot(*zip(*known, strict=True), "o", color=COLOURS[colour], alpha=0.25, markersize=3)
                axes.plot(
                    *zip(*sorted(means), strict=True), style, marker="o", markersize=4, color=COLOURS[colour],
                    markerfacecolor=COLOURS["paper" if suffix else colour], label=label + suffix,
                )  # fmt: skip
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"validation loss, {curve.task}")
        axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1e6:g} M")
        canvas.legend()
        file = io.BytesIO()
        canvas.figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()
