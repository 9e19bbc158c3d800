"""`terminal_summary`: what a run came to, on one screen of 24 lines and 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from moekit.report import wording
from moekit.report.answers import answers
from moekit.report.health import LayerHealth, dropped, experts_per_token, findings, layer_health
from moekit.report.perplexity import where_measured
from moekit.report.predictions import TaskScores, languages_by_perplexity, main_task, predictions
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
    top = [_rule(title), *_headline(folder), Text(), *_quality(folder), *_tasks(folder)]
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
    tokens = number(run.summary, "tokens")
    total, active = number(run.summary, "parameters", "total"), number(run.summary, "parameters", "active")
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
    first = _translation_scores(run) if run.translates else _prediction_scores(run)
    return [first, *(Text(" · ".join(filter(None, parts))) for parts in (work, pace) if any(parts))]


def _translation_scores(run: RunFolder) -> Text:
    bleu, chrf, ppl = run.scores("bleu"), run.scores("chrf"), run.by_task("perplexity")
    perplexity = ppl.get("translation", next(iter(ppl.values()), None))
    line = _numbers(
        ("BLEU", wording.fixed(bleu.average)),
        ("chrF", wording.fixed(chrf.average)),
        ("perplexity", wording.perplexity(perplexity)),
    )
    if bleu.average is not None:
        origin = "test set" if bleu.origin == "test" else "last validation"
        line.append(f"{origin}, {wording.count(len(bleu.directions), 'direction')}", "dim")
    return line


def _prediction_scores(run: RunFolder) -> Text:
    found = main_task(run)
    line = _numbers(
        ("perplexity", wording.perplexity(found.perplexity)),
        ("accuracy", wording.percent(found.accuracy)),
        ("loss", wording.significant(found.loss)),
    )
    return line.append(where_measured(found), "dim") if found.task else line


def _numbers(*pairs: tuple[str, str]) -> Text:
    """Names and values; the first value is the main one."""
    line = Text()
    for i, (label, value) in enumerate(pairs):
        line.append(f"{label} ", "dim")
        line.append(f"{value}   ", "bold" if i else "bold cyan")
    return line


def _quality(run: RunFolder) -> list[Text]:
    written = [line for task in answers(run) for line in (_numbers(*task.averages), Text())]
    return [*_directions(run), *written] if run.translates else written or _languages(run)


def _languages(run: RunFolder) -> list[Text]:
    """Perplexity by language; of a single language the headline has it."""
    found = main_task(run)
    if found.origin == "valid" or not found.task:
        return [Text("Not tested yet: the `test` command measures held-out perplexity.", "yellow"), Text()]
    names = languages_by_perplexity(found)
    if len(names) < 2:
        return []
    if len(names) <= _ALL:
        half = -(-len(names) // 2) if len(names) > 4 else len(names)
        left, right, heads = names[:half], names[half:], ("language", "language")
    else:
        left, right, heads = names[:_EXTREMES], names[-_EXTREMES:][::-1], ("lowest", "highest")
    lines = [Text("".join(f"{head:<20}{'perplexity':>13}       " for head in heads[: 1 + bool(right)]), "dim")]
    for i, name in enumerate(left):
        line = _language_row(name, found)
        lines.append(line + _language_row(right[i], found) if i < len(right) else line)
    if len(names) > _ALL:
        lines.append(Text(f"and {wording.count(len(names) - 2 * _EXTREMES, 'language')} between", "dim"))
    return [*lines, Text()]


def _language_row(name: str, found: TaskScores) -> Text:
    label = name if len(name) <= 19 else f"{name[:18]}…"
    return Text.assemble(f"{label:<20}", (f"{wording.perplexity(found.languages[name]):>13}", "cyan"), "       ")


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
    if not run.translates:
        return _held_out(run, perplexities, losses)
    parts = [f"{task} {wording.perplexity(value)}" for task, value in perplexities.items()]
    lines = [_labelled("perplexity", " · ".join(parts))] if parts else []
    others = [f"{task} {wording.significant(value)}" for task, value in losses.items() if task not in perplexities]
    return lines + ([_labelled("loss", " · ".join(others))] if others else [])


def _held_out(run: RunFolder, perplexities: Mapping[str, float], losses: Mapping[str, float]) -> list[Text]:
    """Tasks beside the main one in the test, and all of them in the last validation, unless the headline has that."""
    rest = predictions(run)[1:]
    tested = [
        f"{x.task} perplexity {wording.perplexity(x.perplexity)}"
        if x.perplexity is not None
        else f"{x.task} loss {wording.significant(x.loss)}"
        for x in rest
        if x.origin == "test"
    ]
    lines = [_labelled("also tested", " · ".join(tested))] if tested else []
    if not rest and main_task(run).origin == "valid":
        return lines
    parts = [f"{task} perplexity {wording.perplexity(value)}" for task, value in perplexities.items()]
    parts += [f"{task} loss {wording.significant(v)}" for task, v in losses.items() if task not in perplexities]
    return lines + ([_labelled("validation", " · ".join(parts))] if parts else [])


def _routing(run: RunFolder) -> list[Text]:
    layers, routing = layer_health(run), dig(run.summary, "routing")
    if not layers and not (isinstance(routing, Mapping) and routing):
        return [_labelled("experts", "none: this model is dense")] if run.dense else []
    evenness = [x.evenness for x in layers if x.evenness is not None]
    entropies = [x.router_entropy for x in layers if x.router_entropy is not None]
    special = [x.specialisation for x in layers if x.specialisation is not None]
    even = _mean(evenness) if evenness else number(routing, "load_entropy")
    parts = [
        said.replace(" %", " % dropped") if (said := dropped(run)) != wording.MISSING else None,
        _dead(layers, number(routing, "dead_experts")),
        f"load CV {wording.fixed(number(routing, 'load_cv'), 2)}",
        f"{wording.fixed(used, 2)} per token" if (used := experts_per_token(run)) is not None else None,
        f"evenness of load {wording.fixed(even, 2)} of 1" if even is not None else None,
        f"router entropy {wording.fixed(_mean(entropies), 2)} of log E" if entropies else None,
    ]
    lines = [_labelled("experts", " · ".join(p for p in parts[:4] if p))]
    if any(parts[4:]):
        lines.append(_labelled("", " · ".join(p for p in parts[4:] if p)))
    if special:
        best = max((x for x in layers if x.specialisation is not None), key=lambda x: x.specialisation or 0.0)
        text = f"{_mean(special):.2f} of 1 by language; most in {best.name} ({best.specialisation:.2f})"
        lines.append(_labelled("specialised", text))
    return lines


def _dead(layers: Sequence[LayerHealth], counted: float | None) -> str:
    """``3 of 32 dead``; experts that a fixed rule passes over are not counted."""
    learned = [x for x in layers if not x.fixed]
    if len(learned) < len(layers) or counted is None:
        counted = float(sum(x.dead for x in learned))
    if layers and not learned:
        return "assigned by a fixed rule"
    return f"{counted:.0f}" + (f" of {sum(x.num_experts for x in learned)}" if learned else "") + " dead"


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
    if run.recipe and (run.path / "checkpoints").is_dir():
        lines += _write(run, folder)
    lines.append(_labelled("compare", f"python -m moekit.report {folder} OTHER_RUN"))
    return lines


def _write(run: RunFolder, folder: str) -> list[Text]:
    """The command that translates, or goes on from prompts; none for a run that does neither."""
    command = f"python -m moekit.recipes.{run.recipe} generate \\"
    if run.translates:
        best = run.scores("bleu").directions
        if not best:
            return []
        source, target = sides(max(best, key=lambda d: best[d]))
        return [_labelled("translate", command), _labelled("", f"  --out {folder} --from {source} --to {target}")]
    spoken = next(([*x.languages] for x in predictions(run) if x.task == "causal_lm"), None)
    languages = spoken or dig(run.summary, "data", "languages")
    if spoken is None or not isinstance(languages, list) or not languages:
        return []
    return [
        _labelled("continue", command),
        _labelled("", f"  --out {folder} --from {shlex.quote(str(languages[0]))}"),
        Text(f"{'':<12}reads prompts from standard input, one a line", "dim"),
    ]


def _labelled(label: str, content: str, *, style: str = "") -> Text:
    return Text.assemble((f"{label:<12}", "dim"), (content, style))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
