"""What the model wrote: translations, continuations, restored text; agreeing words marked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from moekit.report.agreement import Agreement, agreement
from moekit.report.run_folder import RunFolder, sides
from moekit.report.view import TaskSamples
from moekit.runs.record import Sample

LONGEST = 900  # characters that a page shows of one text


def samples(run: RunFolder) -> list[TaskSamples]:
    """Samples by task, and by direction or language."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for sample in run.samples:
        heading = sample.direction.replace("-", " → ", 1) if _translated(sample) else sample.direction
        found.setdefault(sample.task, {}).setdefault(heading or run.task(sample.task).samples.unknown, []).append(
            sample
        )
    return [TaskSamples(run.task(t).title, run.task(t).samples, groups) for t, groups in found.items()]


def languages(sample: Sample) -> tuple[str, str]:
    """Of what was given, and of what was written."""
    return sides(sample.direction) if _translated(sample) else (sample.direction, sample.direction)


def _translated(sample: Sample) -> bool:
    return sample.task == "translation"  # elsewhere a hyphen is part of one language's name


def compared(sample: Sample) -> Agreement:
    """Which words of what is shown agree."""
    return agreement(sample.reference[:LONGEST], sample.hypothesis[:LONGEST])


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
    return text[:LONGEST] + rest(text)


def rest(text: str) -> str:
    """How much of `text` a page does not show."""
    more = len(text) - LONGEST
    return f" … ({more:,} more characters)" if more > 0 else ""
