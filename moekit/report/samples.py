"""Section of samples: translations, continuations, restored text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekit.report import page, wording
from moekit.report.agreement import agreement
from moekit.report.page import text
from moekit.report.predictions import main_task
from moekit.report.run_folder import RunFolder, sides
from moekit.report.style import attribute
from moekit.report.tasks import sample_wording

_SHOWN = 3
_LONGEST = 900


def samples(run: RunFolder) -> str:
    """Samples of what the model wrote, by task and by direction or language; agreeing words marked."""
    tasks = list(dict.fromkeys(sample["task"] for sample in run.samples))
    if not tasks:
        shown = sample_wording("translation" if run.translates else main_task(run).task)
        why = page.note(run.notes.get("samples.json", "samples.json holds no samples."))
        return page.section("samples", shown.title, shown.lead, why)
    if len(tasks) == 1:
        shown = sample_wording(tasks[0])
        return page.section("samples", shown.title, shown.lead, _blocks(run.samples))
    html = ""
    for task in tasks:
        shown = sample_wording(task)
        mine = [sample for sample in run.samples if sample["task"] == task]
        html += f"<h3>{text(shown.title)}</h3><p class=lead>{text(shown.lead)}</p>{_blocks(mine)}"
    return page.section("samples", "Samples", "What the model wrote, task by task.", html)


def _blocks(found: Sequence[Mapping[str, str]]) -> str:
    """Samples of one task under headings of their directions or languages."""
    groups: dict[str, list[Mapping[str, str]]] = {}
    for sample in found:
        groups.setdefault(_heading(sample), []).append(sample)
    blocks = []
    for i, (heading, group) in enumerate(groups.items()):
        shown = "".join(map(_sample, group[:_SHOWN]))
        rest = group[_SHOWN:]
        if rest:
            shown += f"<details class=rest><summary>{len(rest)} more</summary>{''.join(map(_sample, rest))}</details>"
        if len(groups) <= 6:
            blocks.append(f"<h3>{text(heading)}</h3>{shown}")
        else:
            title = f"{heading} · {wording.count(len(group), sample_wording(group[0]['task']).noun)}"
            blocks.append(f"<details{' open' if i < 3 else ''}><summary>{text(title)}</summary>{shown}</details>")
    return f'<div class="samples">{"".join(blocks)}</div>'


def _heading(sample: Mapping[str, str]) -> str:
    direction = sample["direction"] or sample_wording(sample["task"]).unknown
    return _arrow(direction) if sample["task"] == "translation" else direction


def _sample(sample: Mapping[str, str]) -> str:
    """One sample; where the task is not translation, `direction` is one language, and it may hold a hyphen."""
    direction, names = sample["direction"], sample_wording(sample["task"])
    source, target = sides(direction) if sample["task"] == "translation" else (direction, direction)
    found = agreement(sample["reference"][:_LONGEST], sample["hypothesis"][:_LONGEST])
    return (
        f'<dl class="sample"><dt>{names.source}</dt><dd dir="auto"{_lang(source)}>{text(_cut(sample["source"]))}</dd>'
        f'<dt>{names.reference}</dt><dd dir="auto"{_lang(target)}>{marked(found.reference)}'
        f"{_rest(sample['reference'])}</dd>"
        f'<dt>moekit<span class="of">{found.matched} of {wording.count(found.num_words, "word")}</span></dt>'
        f'<dd class="hyp" dir="auto"{_lang(target)}>{marked(found.hypothesis)}{_rest(sample["hypothesis"])}'
        f"{'' if sample['hypothesis'].strip() else '<em>(empty)</em>'}</dd></dl>"
    )


def marked(pieces: Sequence[tuple[str, bool | None]]) -> str:
    """Agreeing words in <mark>, runs of them in one, so that cursive scripts keep their joins."""
    html, run, gap = "", "", ""
    for piece, agrees in pieces:
        if agrees:
            run, gap = run + gap + piece, ""
        elif agrees is None and run:
            gap += piece
        else:
            html += (f"<mark>{text(run)}</mark>" if run else "") + text(gap + piece)
            run, gap = "", ""
    return html + (f"<mark>{text(run)}</mark>" if run else "") + text(gap)


def _cut(value: str) -> str:
    return value[:_LONGEST] + _rest(value) if len(value) > _LONGEST else value


def _rest(value: str) -> str:
    return f" … ({len(value) - _LONGEST:,} more characters)" if len(value) > _LONGEST else ""


def _lang(language: str) -> str:
    return f' lang="{attribute(language)}"' if language else ""


def _arrow(direction: str) -> str:
    return direction.replace("-", " → ", 1)
