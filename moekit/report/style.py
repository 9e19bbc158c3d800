"""One look for every picture: colours that the page resolves, so that a plot follows light, dark and print."""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Matplotlib draws with the light colours; `svg` turns each into a CSS variable that page.css defines twice. The four
# hues are Okabe and Ito's colour-blind-safe blue, vermillion, green and purple; never two of them mean good and bad.
COLOURS = {
    "paper": "#fefefe",
    "ink": "#1c2430",
    "muted": "#667085",
    "rule": "#d9dee6",
    "blue": "#0067a5",
    "red": "#c8500a",
    "green": "#00805c",
    "purple": "#a8508c",
}
CYCLE = ("blue", "red", "green", "purple")

LEGEND_LETTERS = 62  # that fit into one line above a plot, with 5 for each key
SEQUENTIAL_LEVELS = 12
DIVERGING_LEVELS = 17  # odd: the middle class is a fair share
_SEQUENTIAL = {
    "light": ("#f1f6fb", "#a9cbe4", "#3f8fc4", "#0a4f86", "#083a68"),
    "dark": ("#16212e", "#1c4569", "#2f7fb5", "#6fb3de", "#a9d6f2"),
}
_DIVERGING = {
    "light": ("#3a78ad", "#7fb0d3", "#c4dbea", "#f4f3f0", "#f8cfa6", "#df7c2c", "#8a3a06"),
    "dark": ("#3579a8", "#2a5d82", "#23425a", "#262d36", "#74431d", "#d27528", "#ffc99a"),
}

DIVERGING, SEQUENTIAL = _DIVERGING["light"], _SEQUENTIAL["light"]

_PAINTED = {
    "rule": ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"),
    "muted": ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
    "ink": ("text.color", "axes.titlecolor", "legend.labelcolor"),
}
with resources.as_file(resources.files("moekit.report") / "chart.mplstyle") as _path:
    _RC: dict[str, Any] = dict(cast(Any, matplotlib.rc_params_from_file(_path, use_default_template=False)))
_RC |= {part: COLOURS[colour] for colour, parts in _PAINTED.items() for part in parts}
_SVG = {"font.sans-serif": ["DejaVu Sans"]}  # to measure with: page.css names the fonts
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


class ShownFigure(Figure):
    """A figure that a notebook shows by itself, where it is the last value of a cell; pyplot need not be there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            FigureCanvasAgg(self).print_figure(file, format="png", dpi=144)
        return file.getvalue()


class Canvas:
    """A figure in the house style: ``with Canvas() as canvas: canvas.axes.plot(...)``, then `svg`.

    Args:
        height: inches; the width is fixed, so that texts are of one size on the page.
    """

    WIDTH = 4.75

    def __init__(self, height: float = 2.7) -> None:
        self._context = matplotlib.rc_context(cast(Any, _RC))
        self._height = height

    def __enter__(self) -> Canvas:
        self._context.__enter__()
        self.figure = ShownFigure(figsize=(self.WIDTH, self._height), layout="constrained")
        self.axes = self.figure.add_subplot()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def legend(self, *, last: Sequence[str] = ()) -> None:
        """Put the legend above the axes, where it hides nothing; the labels in `last` come last."""
        entries = {label: handle for handle, label in zip(*self.axes.get_legend_handles_labels(), strict=True)}
        labels = sorted(entries, key=lambda label: label in last)
        handles = [entries[label] for label in labels]
        if handles:
            fits = sum(map(len, labels)) + 5 * len(labels) <= LEGEND_LETTERS
            look: dict[str, Any] = {"handlelength": 1.6, "columnspacing": 1.4, "borderpad": 0}
            columns = len(labels) if fits else 2
            legend = self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, **look)
            for handle in legend.legend_handles:
                if isinstance(handle, Line2D):  # a sample of a pale line must still be seen
                    handle.set(alpha=max(handle.get_alpha() or 1.0, 0.6), linewidth=max(handle.get_linewidth(), 1.3))

    def svg(self, description: str) -> Markup:
        """The picture as an inline ``<svg>`` with `description` for those who cannot see it.

        Call it inside the ``with`` block. Fonts come from the page, colours from its variables; nothing in it refers to
        the network, and the same data give the same bytes. Numbers are rounded to a hundredth of a point: a fifth of
        the size, the same picture.
        """
        file, description = io.StringIO(), drawable(description)
        with warnings.catch_warnings(), matplotlib.rc_context(cast(Any, {**_SVG, "svg.hashsalt": description})):
            # Texts are drawn by the browser; Matplotlib only measures them, and may lack a script's glyphs.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
            FigureCanvasSVG(self.figure).print_svg(file, metadata={"Date": None})
        drawing = ElementTree.fromstring(file.getvalue())
        for element in [*drawing.iter()]:
            element.tag = element.tag.rpartition("}")[2]
            element.text, element.tail = ((t or "").strip() or None for t in (element.text, element.tail))
            element.attrib = {
                name.rpartition("}")[2]: _themed(value) if name == "style" else _LONG_NUMBER.sub(_rounded, value)
                for name, value in element.attrib.items()
                if (element.tag, name) != ("g", "id")  # every drawing has the same ones
            }
            for child in [*element]:
                if child.tag.rpartition("}")[2] in ("metadata", "style"):
                    element.remove(child)
        drawing.attrib = {"role": "img", "aria-label": description, "viewBox": drawing.attrib["viewBox"]}
        return Markup(ElementTree.tostring(drawing, encoding="unicode"))


def drawable(label: str) -> str:
    """`label` without what a font or an SVG file cannot hold: controls, lone surrogates, noncharacters.

    Matplotlib leaves labels that begin with an underscore out of its legends: they begin with a space.
    """
    held = "".join(c if unicodedata.category(c) not in ("Cc", "Cs", "Cn") else "\ufffd" for c in label)
    return f" {held}" if held.startswith("_") else held


def _themed(style: str) -> str:
    """A style attribute with the page's variables for colours."""
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name})")
    return style


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def sequential_class(value: float | None, low: float, high: float) -> str:
    """CSS class of a cell on the scale from `low` (pale) to `high` (deep)."""
    if value is None or not math.isfinite(value):
        return "na"
    place = (value - low) / (high - low) if high > low else 0.5
    return f"s{min(SEQUENTIAL_LEVELS - 1, max(0, int(place * SEQUENTIAL_LEVELS)))}"


def shade(name: str) -> tuple[str, str] | None:
    """Colours of a cell's CSS class and of the ink on it, by day; None of "na"."""
    letter, level = name[:1], name[1:]
    if letter not in ("s", "d") or not level.isdecimal():
        return None
    anchors, count = (SEQUENTIAL, SEQUENTIAL_LEVELS) if letter == "s" else (DIVERGING, DIVERGING_LEVELS)
    colour = to_hex(LinearSegmentedColormap.from_list("", anchors)(int(level) / (count - 1)))
    return colour, _ink_on(colour)


def diverging_class(ratio: float | None) -> str:
    """CSS class of a cell whose fair value is 1: a quarter and less is deep blue, four times and more deep orange."""
    if ratio is None or not math.isfinite(ratio):
        return "na"
    half = DIVERGING_LEVELS // 2
    place = math.log2(max(ratio, 1e-9)) / 2 * half
    return f"d{half + max(-half, min(half, round(place)))}"


def palette_css() -> str:
    """Rules of the heat-map classes for both themes, each with the ink that is readable on it."""
    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{_rules('dark')}\n}}"
    return f"{_rules('light')}\n{dark}"


def _rules(theme: str) -> str:
    rules = []
    for letter, anchors, count in (("s", _SEQUENTIAL, SEQUENTIAL_LEVELS), ("d", _DIVERGING, DIVERGING_LEVELS)):
        colours = LinearSegmentedColormap.from_list("", anchors[theme])
        for level in range(count):
            shade = to_hex(colours(level / (count - 1)))
            rules.append(f".{letter}{level}{{background:{shade};color:{_ink_on(shade)}}}")
    return "\n".join(rules)


def _ink_on(shade: str) -> str:
    """Black or white ink, whichever has the greater contrast (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#0b1220"
