"""What the model wrote: translations, continuations, restored text; agreeing words marked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from moekit.report.run_folder import RunFolder, sides
from moekit.report.view import LONGEST_SAMPLE, ShownSample, TaskSamples


def samples(run: RunFolder) -> list[TaskSamples]:
    """Samples by task, and by direction or language."""
    found: dict[str, dict[str, list[ShownSample]]] = {}
    for sample in run.samples:
        names, direction = run.task(sample.task).samples, sample.direction
        translated = sample.task == "translation"  # elsewhere a hyphen is part of one language's name
        heading = direction.replace("-", " → ", 1) if translated else direction
        languages = sides(direction) if translated else (direction, direction)
        group = found.setdefault(sample.task, {}).setdefault(heading or names.unknown, [])
        group.append(ShownSample(names, languages, sample.source, sample.reference, sample.hypothesis))
    return [TaskSamples(run.task(t).title, run.task(t).samples, groups) for t, groups in found.items()]


def marked(pieces: Sequence[tuple[str, bool | None]]) -> Markup:
    """Agreeing words in <mark>, runs of them in one, so that cursive scripts keep their joins."""
    kinds = "".join("-" if agrees is None else "y" if agrees else "n" for _, agrees in pieces)
    html = Markup("")
    for run in re.finditer("y(?:[y-]*y)?|[^y]+", kinds):
        text = "".join(piece for piece, _ in pieces[run.start() : run.end()])
        html += Markup("<mark>{}</mark>").format(text) if run[0].startswith("y") else escape(text)
    return html


def cut(text: str) -> str:
    """`text`, or what of it a page shows."""
    return text[:LONGEST_SAMPLE] + rest(text)


def rest(text: str) -> str:
    """How much of `text` a page does not show."""
    more = len(text) - LONGEST_SAMPLE
    return f" … ({more:,} more characters)" if more > 0 else ""
