"""What a report shows, decided once: page, terminal and markdown only lay out what stands in these classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moekit.report.agreement import Agreement, agreement
from moekit.report.health import Finding
from moekit.report.plots import Chart
from moekit.report.tasks import SampleWording

LONGEST_SAMPLE = 900  # characters that a page shows of one text


@dataclass(frozen=True)
class Tile:
    """A headline number in words, and a remark on it."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of words, the first of which names the row; `title` is its heading where it stands alone.

    `signatures` say how each score in it was computed.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """A heat map that is a table, so that it can be read as well as seen.

    Attributes:
        corner: what the rows are.
        columns: column headers.
        rows: (header, cells), a cell being (CSS class, text); a row may be shorter than the header.
        kind: "matrix" (roomy, with texts), "dense" (colours only; the texts are for screen readers) or "".
        label_width: CSS width of the row headers.
        least: CSS width below which a phone scrolls it.
        title: its heading among several maps.
        remark: what stands beside the heading.
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
    """Something to look at.

    Attributes:
        title: its heading.
        see: one sentence on what it shows.
        worry: one on what would be bad; "" for none.
        chart: a drawing.
        heats: heat maps.
        scale: their legend.
        map_width: least width in pixels of each of several maps.
        table: a table.
        numbers: a table behind a fold.
        fold: what the fold is called.
        wide: whether it takes the width of the page.
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
    fold: str = "Numbers"
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its name in the navigation, figures in cells of a grid, remarks at its end."""

    anchor: str
    link: str
    title: str
    lead: str
    notes: Sequence[str] = ()
    cells: Sequence[Sequence[Figure]] = ()
    remark: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What the model was given, what would have been right, and what it wrote; `languages` of source and target."""

    wording: SampleWording
    languages: tuple[str, str]
    source: str
    reference: str
    hypothesis: str

    @property
    def agreement(self) -> Agreement:
        """Which words of what is shown agree."""
        return agreement(self.reference[:LONGEST_SAMPLE], self.hypothesis[:LONGEST_SAMPLE])


@dataclass(frozen=True)
class TaskSamples:
    """Samples of one task by direction or language, under the headings that they are shown with."""

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
    """A page.

    Attributes:
        kind: what stands above the title.
        title: the run, or the runs.
        lead: one line on it.
        tiles: headline numbers, the main one first.
        sections: in the order of the page.
        findings: what is well and what is not.
        notes: remarks on the whole.
        tables: those that a text shows, each with a title.
        samples: what the model wrote, by task; None where a page has no such section.
        no_samples: the wording of a section without samples.
        samples_note: why there are none.
        provenance: how to make the run again.
        remark: how to read the tables in a text.
        footer: the last line.
    """

    kind: str
    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[TaskSamples] | None = None
    no_samples: SampleWording = field(default_factory=SampleWording)
    samples_note: str = ""
    provenance: Provenance | None = None
    remark: str = ""
    footer: str = "Made by moekit."
