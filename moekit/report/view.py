"""What a report shows, decided once: page, terminal and markdown only lay out what stands in these classes."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

from moekit.report.health import Finding
from moekit.report.plots import Chart
from moekit.runs.record import Sample
from moekit.tasks import SampleWording


@dataclass(frozen=True)
class Tile:
    """A headline number in words, and a remark on it."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of words, the first of which names the row; how scores in it were computed say `signatures`.

    The kind is "n" (numbers) or "text".
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)
    kind: str = "n"


@dataclass(frozen=True)
class Heat:
    """A heat map that is a table, so that it can be read as well as seen; `remark` stands beside its `title`.

    A cell is (CSS class, text). The kind is "matrix" (roomy, with texts), "dense" (colours only; the texts are for
    screen readers) or "". A phone scrolls a map that is narrower than the CSS width `least`.
    """

    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    kind: str = ""
    label_width: str = "4.2rem"
    least: str = "0"
    title: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Scale:
    """The legend of a heat map: its CSS classes in order, what both ends mean, and a remark."""

    classes: Sequence[str]
    left: str
    right: str
    remark: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, heat maps or a table, with a sentence on what to see and one on what would be bad ("" for none).

    Several maps stand side by side, each at least `map_width` pixels wide. `numbers` lie behind a fold. `name` is what
    `moekit.report.figure` knows a drawing or heat maps by; "" = not drawn there.
    """

    title: str
    see: str = ""
    worry: str = ""
    chart: Chart | None = None
    heats: Sequence[Heat] = ()
    scale: Scale | None = None
    map_width: int = 0
    table: Table | None = None
    numbers: Table | None = None
    wide: bool = False
    name: str = ""


@dataclass(frozen=True)
class PageSection:
    """A part of the page: figures in cells of a grid, notes before and a remark and signatures after them."""

    anchor: str
    link: str
    title: str
    lead: str
    notes: Sequence[str] = ()
    cells: Sequence[Sequence[Figure]] = ()
    remark: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSamples:
    """Samples of one task under headings of their directions or languages."""

    title: str
    wording: SampleWording
    groups: Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from: commands, the text of config.yaml, and the machine; notes on what is missing."""

    command: str
    report_command: str
    config: str
    environment: Mapping[str, str]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class View:
    """A page, and what of it a text shows: tiles, findings, notes, `tables`, samples, the command, the remark.

    `ended` says why a run ended before its schedule did, and `go_on` is the command that trains the rest of it.

    A page without a section of samples has None; where a run has no samples, `no_samples` words the section and
    `samples_note` says why.
    """

    kind: str
    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[PageSection]
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    ended: Sequence[str] = ()
    go_on: str = ""
    tables: Sequence[Table] = ()
    samples: Sequence[TaskSamples] | None = None
    no_samples: SampleWording = field(default_factory=SampleWording)
    samples_note: str = ""
    provenance: Provenance | None = None
    remark: str = ""
    footer: str = "Made by moekit."


@functools.cache
def texts() -> dict[str, dict[str, list[str]]]:
    """The prose of texts.toml."""
    return tomllib.loads((resources.files("moekit.report") / "texts.toml").read_text(encoding="utf-8"))


def caption(key: str, *, group: str = "figures", worry: bool = True, **words: str) -> tuple[str, str, str]:
    """Title, what to see, and what would be bad, of a figure in texts.toml."""
    title, see, bad = (text.format(**words) for text in texts()[group][key])
    return title, see, bad if worry else ""


def heading(key: str, **words: str) -> tuple[str, str, str, str]:
    """Anchor, link, title and lead of a section in texts.toml."""
    anchor, link, title, lead = (text.format(**words) for text in texts()["sections"][key])
    return anchor, link, title, lead
