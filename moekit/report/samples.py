"""Section of sample translations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moekit.report import page, wording
from moekit.report.agreement import agreement
from moekit.report.page import text
from moekit.report.run_folder import RunFolder, sides
from moekit.report.style import attribute

_SHOWN = 3
_LONGEST = 900


def samples(run: RunFolder) -> str:
    """Sample translations by direction, agreeing words marked."""
    lead = (
        "Held-out sentences the model never saw. Marked words stand in the reference too, in the same order; an "
        "unmarked word may still be a good synonym."
    )
    if not run.samples:
        return page.section(
            "samples",
            "Sample translations",
            lead,
            page.note(run.notes.get("samples.json", "samples.json holds no samples.")),
        )
    by_direction: dict[str, list[Mapping[str, str]]] = {}
    for sample in run.samples:
        by_direction.setdefault(sample["direction"] or "direction not recorded", []).append(sample)
    blocks = []
    for i, (direction, found) in enumerate(by_direction.items()):
        shown = "".join(map(_sample, found[:_SHOWN]))
        rest = found[_SHOWN:]
        if rest:
            shown += f"<details class=rest><summary>{len(rest)} more</summary>{''.join(map(_sample, rest))}</details>"
        if len(by_direction) <= 6:
            blocks.append(f"<h3>{text(_arrow(direction))}</h3>{shown}")
        else:
            title = f"{_arrow(direction)} · {wording.count(len(found), 'sentence')}"
            blocks.append(f"<details{' open' if i < 3 else ''}><summary>{text(title)}</summary>{shown}</details>")
    return page.section("samples", "Sample translations", lead, f'<div class="samples">{"".join(blocks)}</div>')


def _sample(sample: Mapping[str, str]) -> str:
    source, target = sides(sample["direction"])
    found = agreement(sample["reference"][:_LONGEST], sample["hypothesis"][:_LONGEST])
    return (
        f'<dl class="sample"><dt>Source</dt><dd dir="auto"{_lang(source)}>{text(_cut(sample["source"]))}</dd>'
        f'<dt>Reference</dt><dd dir="auto"{_lang(target)}>{marked(found.reference)}{_rest(sample["reference"])}</dd>'
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
