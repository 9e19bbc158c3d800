"""`terminal_summary`: what a run came to, on one screen of 24 lines and 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from moekit.report import wording
from moekit.report.health import drop_rate, findings, layer_health
from moekit.report.run_folder import RunFolder, Scores, dig, number, read_run, sides

WIDTH = 80
HEIGHT = 24
_ALL = 12  # directions shown one by one: two columns of six
_PLAIN = str.maketrans({"\u2500": "-", "\u2013": "-", "\u2026": "~", "\u00b7": "|"})
_EXTREMES = 4  # of more directions, the best and the worst


def terminal_summary(run: Path | Mapping[str, Any], console: Console | None = None) -> None:
    """Print a run's results on one screen: at most 24 lines of 80 columns.

    Args:
        run: the run folder, or the content of its summary.json.
        console: where to print; a new one on standard output by default.

    Raises:
        UserError: if `run` is a path but not a run folder.
    """
    console = console or Console()
    folder = RunFolder(Path(), summary=run) if isinstance(run, Mapping) else read_run(Path(run))
    where = None if isinstance(run, Mapping) else folder.path
    title = folder.name if where is not None or folder.recipe else "run"
    top = [_rule(title), *_headline(folder), Text(), *_directions(folder), *_tasks(folder)]
    commands = _next(folder) if where is not None else []
    troubles = _troubles(folder)
    room = HEIGHT - len(top) - len(troubles) - len(commands) - bool(commands)
    lines = [*top, *_routing(folder)[: max(0, room)], *troubles]
    for line in [*lines, Text()] if commands else lines:
        shown = _printable(line, console)
        shown.rstrip()
        shown.truncate(min(WIDTH, console.width), overflow="ellipsis")
        console.print(shown, no_wrap=True, crop=True, highlight=False)
    for line in commands:
        # A path or command is of use only whole: the terminal may fold it, a copy of it has no line break.
        console.print(_printable(line, console), soft_wrap=True, highlight=False)


def _printable(line: Text, console: Console) -> Text:
    """`line` in characters that the terminal's encoding has."""
    if console.encoding.lower().startswith("utf"):
        return line
    plain = line.plain.translate(_PLAIN)
    return Text(plain.encode(console.encoding, "replace").decode(console.encoding))


def _rule(title: str) -> Text:
    left = f"── {title} "
    return Text.assemble((left, "bold"), ("─" * max(0, WIDTH - len(left)), "dim"))


def _headline(run: RunFolder) -> list[Text]:
    bleu, chrf, ppl = run.scores("bleu"), run.scores("chrf"), run.by_task("perplexity")
    tokens = number(run.summary, "tokens")
    total, active = number(run.summary, "parameters", "total"), number(run.summary, "parameters", "active")
    perplexity = ppl.get("translation", next(iter(ppl.values()), None))
    first = Text()
    for label, value in (
        ("BLEU", wording.fixed(bleu.average)),
        ("chrF", wording.fixed(chrf.average)),
        ("perplexity", wording.perplexity(perplexity)),
    ):
        first.append(f"{label} ", "dim")
        first.append(f"{value}   ", "bold cyan" if label == "BLEU" else "bold")
    if bleu.average is not None:
        origin = "test set" if bleu.origin == "test" else "last validation"
        first.append(f"{origin}, {wording.count(len(bleu.directions), 'direction')}", "dim")
    size = (
        f"{wording.short(total)} parameters" + (f" ({wording.short(active)} active)" if active else "") if total else ""
    )
    work = [
        size,
        wording.count(run.steps, "step") if run.steps else "",
        f"{wording.short(tokens)} tokens" if tokens else "",
    ]
    seconds, speed = number(run.summary, "wall_seconds"), run.tokens_per_second
    pace = [
        wording.duration(seconds) if seconds is not None else "",
        f"{wording.short(speed)} tokens per second" if speed else "",
    ]
    return [first, *(Text(" · ".join(filter(None, parts))) for parts in (work, pace) if any(parts))]


def _directions(run: RunFolder) -> list[Text]:
    bleu, chrf = run.scores("bleu"), run.scores("chrf")
    names = sorted(bleu.directions, key=lambda d: -bleu.directions[d])
    if not names:
        return [Text("No BLEU in this folder: the `test` command measures it.", "yellow")]
    if len(names) <= _ALL:
        half = -(-len(names) // 2) if len(names) > 4 else len(names)
        left, right = names[:half], names[half:]
        heads = ("direction", "direction")
    else:
        left, right = names[:_EXTREMES], names[-_EXTREMES:][::-1]
        heads = ("best", "worst")
    lines = [_scores_head(heads[0]) + (_scores_head(heads[1]) if right else Text())]
    for i, name in enumerate(left):
        line = _scores_row(name, bleu, chrf)
        lines.append(line + _scores_row(right[i], bleu, chrf) if i < len(right) else line)
    if len(names) > _ALL:
        lines += [_averages("average from ", bleu, 0), _averages("average into ", bleu, 1)]
    return [*lines, Text()]


def _scores_head(name: str) -> Text:
    return Text(f"{name:<20}{'BLEU':>6}{'chrF':>7}       ", "dim")


def _scores_row(name: str, bleu: Scores, chrf: Scores) -> Text:
    label = name if len(name) <= 19 else f"{name[:18]}…"
    value = f"{wording.fixed(bleu.directions.get(name)):>6}"
    return Text.assemble(f"{label:<20}", (value, "cyan"), f"{wording.fixed(chrf.directions.get(name)):>7}       ")


def _averages(title: str, found: Scores, side: int) -> Text:
    """Average over the directions that share a source (side 0) or a target (side 1), the best first."""
    groups: dict[str, list[float]] = {}
    for direction, value in found.directions.items():
        groups.setdefault(sides(direction)[side], []).append(value)
    means = {language: sum(v) / len(v) for language, v in groups.items()}
    line = Text(title, "dim")
    for i, language in enumerate(sorted(means, key=lambda x: -means[x])):
        piece = f"{'  ' if i else ''}{language} {means[language]:.0f}"
        if len(line) + len(piece) > WIDTH - 3:
            line.append(" …", "dim")
            break
        line.append(piece)
    return line


def _tasks(run: RunFolder) -> list[Text]:
    perplexities, losses = run.by_task("perplexity"), run.by_task("loss")
    parts = [f"{task} {wording.perplexity(value)}" for task, value in perplexities.items()]
    lines = [_labelled("perplexity", " · ".join(parts))] if parts else []
    others = [f"{task} {wording.significant(value)}" for task, value in losses.items() if task not in perplexities]
    return lines + ([_labelled("loss", " · ".join(others))] if others else [])


def _routing(run: RunFolder) -> list[Text]:
    layers, routing = layer_health(run), dig(run.summary, "routing")
    if not layers and not (isinstance(routing, Mapping) and routing):
        return [_labelled("experts", "none: this model is dense")] if run.dense else []
    evenness = [x.evenness for x in layers if x.evenness is not None]
    entropies = [x.router_entropy for x in layers if x.router_entropy is not None]
    special = [x.specialisation for x in layers if x.specialisation is not None]
    dead = number(routing, "dead_experts")
    dead = dead if dead is not None else float(sum(x.dead for x in layers))
    total = sum(x.num_experts for x in layers)
    even = _mean(evenness) if evenness else number(routing, "load_entropy")
    parts = [
        f"{percent} dropped" if (percent := wording.percent(drop_rate(run))) != wording.MISSING else None,
        f"{dead:.0f}" + (f" of {total}" if total else "") + " dead",
        f"load CV {wording.fixed(number(routing, 'load_cv'), 2)}",
        f"evenness of load {wording.fixed(even, 2)} of 1" if even is not None else None,
        f"router entropy {wording.fixed(_mean(entropies), 2)} of log E" if entropies else None,
    ]
    lines = [_labelled("experts", " · ".join(p for p in parts[:3] if p))]
    if any(parts[3:]):
        lines.append(_labelled("", " · ".join(p for p in parts[3:] if p)))
    if special:
        best = max((x for x in layers if x.specialisation is not None), key=lambda x: x.specialisation or 0.0)
        text = f"{_mean(special):.2f} of 1 by language; most in {best.name} ({best.specialisation:.2f})"
        lines.append(_labelled("specialised", text))
    return lines


def _troubles(run: RunFolder) -> list[Text]:
    bad = [f.text for f in findings(run) if not f.good]
    return [Text.assemble(("! ", "bold yellow"), (text, "yellow")) for text in bad[:2]]


def _next(run: RunFolder) -> list[Text]:
    folder = shlex.quote(wording.nearby(run.path))
    report = run.path / "report.html"
    lines = [
        _labelled(
            "report", wording.nearby(report) if report.is_file() else f"python -m moekit.report {folder}", style="bold"
        )
    ]
    best = run.scores("bleu").directions
    if best and run.recipe and (run.path / "checkpoints").is_dir():
        source, target = sides(max(best, key=lambda d: best[d]))
        lines.append(_labelled("translate", f"python -m moekit.recipes.{run.recipe} generate \\"))
        lines.append(_labelled("", f"  --out {folder} --from {source} --to {target}"))
    lines.append(_labelled("compare", f"python -m moekit.report {folder} OTHER_RUN"))
    return lines


def _labelled(label: str, content: str, *, style: str = "") -> Text:
    return Text.assemble((f"{label:<12}", "dim"), (content, style))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
