"""`results_markdown`: a run's numbers and samples as a page to commit, readable as it is and in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from moekit.report import wording
from moekit.report.health import findings, layer_health
from moekit.report.provenance import reproduce_command
from moekit.report.run_folder import RunFolder, number, read_run

_LONGEST = 400


def results_markdown(run_dir: Path, *, samples_per_direction: int = 2) -> str:
    """Summary, scores, routing and samples of a run as GitHub-flavoured markdown.

    Args:
        run_dir: the run folder.
        samples_per_direction: translations shown for each direction.

    Raises:
        UserError: if `run_dir` is not a run folder.
    """
    run = read_run(Path(run_dir))
    parts = [f"# {literal(run.name)}", table(["", ""], headline_rows(run)), *_notes(run)]
    parts += _scores(run)
    losses, perplexities = run.by_task("loss"), run.by_task("perplexity")
    if losses or perplexities:
        rows = [
            (t, wording.significant(losses.get(t)), wording.perplexity(perplexities.get(t)))
            for t in dict.fromkeys([*losses, *perplexities])
        ]
        parts += ["## Tasks", table(["task", "validation loss", "perplexity"], rows)]
    layers = layer_health(run)
    if layers:
        headers = ["layer", "experts", "evenness", "load CV", "dropped", "dead", "specialisation"]
        body = [
            (
                x.name,
                x.num_experts,
                wording.fixed(x.evenness, 3),
                wording.fixed(x.load_cv, 2),
                wording.percent(x.drop_rate),
                x.dead,
                wording.fixed(x.specialisation, 2),
            )
            for x in layers
        ]
        parts += ["## Experts", table(headers, body)]
    parts += _samples(run, samples_per_direction)
    command = reproduce_command(run)
    if command:
        parts += ["## Reproduce", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def headline_rows(run: RunFolder) -> list[tuple[str, str]]:
    """(name, value) of the headline numbers of a run."""
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    suffix = "" if bleu.origin == "test" else " (last validation)"
    return [
        (f"BLEU, average{suffix}", wording.fixed(bleu.average)),
        (f"chrF, average{suffix}", wording.fixed(chrf.average)),
        ("parameters", wording.short(number(run.summary, "parameters", "total"))),
        ("active parameters", wording.short(number(run.summary, "parameters", "active"))),
        ("steps", f"{run.steps:,}" if run.steps else wording.MISSING),
        ("tokens", wording.short(number(run.summary, "tokens"))),
        ("tokens per second", wording.short(run.tokens_per_second)),
        ("time", wording.duration(number(run.summary, "wall_seconds"))),
    ]


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table: first column left, the others right; texts are escaped."""
    lines = [
        "| " + " | ".join(literal(str(h)) for h in headers) + " |",
        "|" + "|".join(":---" if i == 0 else "---:" for i in range(len(headers))) + "|",
    ]
    lines += ["| " + " | ".join(literal(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def literal(text: str) -> str:
    """`text` so that markdown shows it as it is, on one line."""
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} more characters)"
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _notes(run: RunFolder) -> list[str]:
    return ["\n".join(f"- {literal(f.text)}" for f in findings(run))] if findings(run) else []


def _scores(run: RunFolder) -> list[str]:
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    if not bleu.directions:
        return []
    order = sorted(bleu.directions, key=lambda d: -bleu.directions[d])
    rows = [(d, wording.fixed(bleu.directions[d]), wording.fixed(chrf.directions.get(d))) for d in order]
    signed = " · ".join(f"`{s.signature}`" for s in (bleu, chrf) if s.signature)
    found = ["## Translation quality", table(["direction", "BLEU", "chrF"], rows)]
    return [*found, f"Signatures: {signed}"] if signed else found


def _samples(run: RunFolder, count: int) -> list[str]:
    by_direction: dict[str, list[str]] = {}
    for sample in run.samples:
        lines = by_direction.setdefault(sample["direction"] or "direction not recorded", [])
        if len(lines) < count:
            lines.append(
                f"- source: {literal(sample['source'])}<br>\n  reference: {literal(sample['reference'])}<br>\n"
                f"  **moekit: {literal(sample['hypothesis'])}**"
            )
    if not by_direction:
        return []
    return ["## Samples", *(f"### {literal(d)}\n\n" + "\n".join(lines) for d, lines in by_direction.items())]
