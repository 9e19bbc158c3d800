"""What the model wrote: translations, continuations, restored text; agreeing words marked."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from moekit.report.run_folder import RunFolder, sides
from moekit.report.view import LONGEST_SAMPLE, Sample, TaskSamples


def samples(run: RunFolder) -> list[TaskSamples]:
    """Samples by task, and by direction or language."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for sample in run.samples:
        names, direction = run.task(sample["task"]).samples, sample["direction"]
        translated = sample["task"] == "translation"  # elsewhere a hyphen is part of one language's name
        heading = direction.replace("-", " → ", 1) if translated else direction
        languages = sides(direction) if translated else (direction, direction)
        group = found.setdefault(sample["task"], {}).setdefault(heading or names.unknown, [])
        group.append(Sample(names, languages, *(sample[k] for k in ("source", "reference", "hypothesis"))))
    return [TaskSamples(run.task(t).title, run.task(t).samples, groups) for t, groups in found.items()]


def marked(pieces: Sequence[tuple[str, bool | None]]) -> Markup:
    """Agreeing words in <mark>, runs of them in one, so that cursive scripts keep their joins."""
    html, run, gap = Markup(""), "", ""

    def closed() -> Markup:
        return (Markup("<mark>{}</mark>").format(run) if run else Markup("")) + escape(gap)

    for piece, agrees in pieces:
        if agrees:
            run, gap = run + gap + piece, ""
        elif agrees is None and run:
            gap += piece
        else:
            html += closed() + escape(piece)
            run, gap = "", ""
    return html + closed()


def cut(text: str) -> str:
    """`text`, or what of it a page shows."""
    return text[:LONGEST_SAMPLE] + rest(text)


def rest(text: str) -> str:
    """How much of `text` a page does not show."""
    more = len(text) - LONGEST_SAMPLE
    return f" … ({more:,} more characters)" if more > 0 else ""
