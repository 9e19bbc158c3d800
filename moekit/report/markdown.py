"""`results_markdown`: a run's numbers and samples as a page to commit, readable as it is and in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from moekit.report import wording
from moekit.report.answers import answers
from moekit.report.health import findings, layer_health
from moekit.report.predictions import languages_by_perplexity, main_task, predictions
from moekit.report.provenance import reproduce_command
from moekit.report.run_folder import RunFolder, number, read_run
from moekit.report.tasks import sample_wording, task_title

_LONGEST = 400


def results_markdown(run_dir: Path, *, samples_per_direction: int = 2) -> str:
    """Summary, scores, routing and samples of a run as GitHub-flavoured markdown.

    Args:
        run_dir: the run folder.
        samples_per_direction: samples shown for each direction, or for each language of another task.

    Raises:
        UserError: if `run_dir` is not a run folder.
    """
    run = read_run(Path(run_dir))
    parts = [f"# {literal(run.name)}", table(["", ""], headline_rows(run)), *_notes(run)]
    parts += _scores(run)
    for found in answers(run):
        parts += [f"## {literal(found.title)}", table(["direction", *found.scores], found.rows)]
    losses, perplexities = run.by_task("loss"), run.by_task("perplexity")
    if losses or perplexities:
        rows = [
            (t, wording.significant(losses.get(t)), wording.perplexity(perplexities.get(t)))
            for t in dict.fromkeys([*losses, *perplexities])
        ]
        parts += ["## Tasks", table(["task", "validation loss", "perplexity"], rows)]
    layers = layer_health(run)
    if layers:
        used = any(x.experts_per_token is not None for x in layers)
        headers = ["layer", "experts", *(["experts per token"] if used else [])]
        headers += ["evenness", "load CV", "dropped", "dead", "specialisation"]
        body = [
            (
                x.name,
                x.num_experts,
                *([wording.fixed(x.experts_per_token, 2)] if used else []),
                wording.fixed(x.evenness, 3),
                wording.fixed(x.load_cv, 2),
                wording.percent(x.drop_rate),
                wording.MISSING if x.fixed else x.dead,
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
    return [
        *(_translation_rows(run) if run.translates else _prediction_rows(run)),
        ("parameters", wording.short(number(run.summary, "parameters", "total"))),
        ("active parameters", wording.short(number(run.summary, "parameters", "active"))),
        ("steps", f"{run.steps:,}" if run.steps else wording.MISSING),
        ("tokens", wording.short(number(run.summary, "tokens"))),
        ("tokens per second", wording.short(run.tokens_per_second)),
        ("time", wording.duration(number(run.summary, "wall_seconds"))),
        ("peak memory", wording.memory(number(run.summary, "peak_memory", "bytes"))),
        ("its forecast", wording.memory(number(run.summary, "peak_memory", "forecast"))),
    ]


def _translation_rows(run: RunFolder) -> list[tuple[str, str]]:
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    suffix = "" if bleu.origin == "test" else " (last validation)"
    return [
        (f"BLEU, average{suffix}", wording.fixed(bleu.average)),
        (f"chrF, average{suffix}", wording.fixed(chrf.average)),
    ]


def _prediction_rows(run: RunFolder) -> list[tuple[str, str]]:
    found = main_task(run)
    suffix = "" if found.origin == "test" else " (last validation)"
    return [
        (f"perplexity{suffix}", wording.perplexity(found.perplexity)),
        (f"loss, nats per token{suffix}", wording.significant(found.loss)),
        (f"accuracy{suffix}", wording.percent(found.accuracy)),
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
    if not run.translates:
        return _perplexities(run)
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    if not bleu.directions:
        return []
    order = sorted(bleu.directions, key=lambda d: -bleu.directions[d])
    rows = [(d, wording.fixed(bleu.directions[d]), wording.fixed(chrf.directions.get(d))) for d in order]
    signed = " · ".join(f"`{s.signature}`" for s in (bleu, chrf) if s.signature)
    found = ["## Translation quality", table(["direction", "BLEU", "chrF"], rows)]
    return [*found, f"Signatures: {signed}"] if signed else found


def _perplexities(run: RunFolder) -> list[str]:
    """Test scores of every task, and perplexity by language; the last validation has a table of its own."""
    tested = [x for x in predictions(run) if x.origin == "test"]
    found = []
    if len(tested) > 1:  # of one task the headline says it all
        rows = [
            (x.task, wording.significant(x.loss), wording.perplexity(x.perplexity), wording.percent(x.accuracy))
            for x in tested
        ]
        found += ["## Test", table(["task", "test loss", "perplexity", "accuracy"], rows)]
    tables = [x for x in tested if x.languages]
    if tables:
        order = dict.fromkeys(language for x in tables for language in languages_by_perplexity(x))
        headers = ["language", *(["perplexity"] if len(tables) == 1 else [x.task for x in tables])]
        cells = [(name, *(wording.perplexity(x.languages.get(name)) for x in tables)) for name in order]
        found += ["## Perplexity by language", table(headers, cells)]
    return found


def _samples(run: RunFolder, count: int) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for sample in run.samples:
        wanted = sample_wording(sample["task"])
        lines = groups.setdefault((sample["task"], sample["direction"] or wanted.unknown), [])
        if len(lines) < count:
            lines.append(
                f"- {wanted.source.lower()}: {literal(sample['source'])}<br>\n"
                f"  {wanted.reference.lower()}: {literal(sample['reference'])}<br>\n"
                f"  **moekit: {literal(sample['hypothesis'])}**"
            )
    if not groups:
        return []
    several = len({task for task, _ in groups}) > 1
    parts = [
        f"### {literal(f'{task_title(task)}: {direction}' if several else direction)}\n\n" + "\n".join(lines)
        for (task, direction), lines in groups.items()
    ]
    return ["## Samples", *parts]
