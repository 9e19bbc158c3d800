"""`terminal_summary`: what a run came to, on one screen of 24 lines and 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from moekit.report import wording
from moekit.report.agreement import agreement_words
from moekit.report.ending import cut
from moekit.report.health import findings, layer_health
from moekit.report.predictions import TaskScores, main_task, predictions
from moekit.report.reading import read_run
from moekit.report.recall import above_floor, recall_words
from moekit.report.results import answer_tables, costs, known, rankings, routing_words, score_tiles
from moekit.report.run_folder import RunFolder, dig, number, sides
from moekit.report.typical import typical_line
from moekit.report.view import Table
from moekit.shell import command_line
from moekit.terminal import Terminal

WIDTH = 80
HEIGHT = 24
_ALL = 12  # directions shown one by one: two columns of six
_EXTREMES = 4  # of more directions, the best and the worst
_TROUBLES = 2  # findings that are shown, the worst first; the page has all
_PLAIN = str.maketrans({"\u2500": "-", "\u2013": "-", "\u2026": "~", "\u00b7": "|"})


def terminal_summary(run: Path | Mapping[str, Any], console: Console | None = None) -> None:
    """Print a run's results on one screen: at most 24 lines of 80 columns.

    Args:
        run: the run folder, or the content of its summary.json.
        console: where to print; a new one on standard output by default.

    Raises:
        UserError: if `run` is a path but not a run folder.
    """
    console = console or Terminal()
    folder = RunFolder(Path(), summary=run) if isinstance(run, Mapping) else read_run(Path(run))
    title = "run" if isinstance(run, Mapping) and not folder.recipe else folder.name
    commands = [] if isinstance(run, Mapping) else _next(folder)
    was_cut = cut(folder)
    ended = [*filter(None, [folder.stopped]), *(was_cut.lines if was_cut else [])]
    warned = [Text(f"! {line}", "bold yellow") for line in ended]
    top = [_rule(title), *_headline(folder), *warned, Text(), *_quality(folder), *_tasks(folder), *_knowledge(folder)]
    troubles = _troubles(folder)
    room = HEIGHT - len(top) - len(troubles) - len(commands) - bool(commands)
    for line in [*top, *_routing(folder)[: max(0, room)], *troubles, *([Text()] if commands else [])]:
        shown = _printable(line, console)
        shown.rstrip()
        shown.truncate(min(WIDTH, console.width), overflow="ellipsis")
        console.print(_printable(shown, console), no_wrap=True, crop=True, highlight=False)
    for line in commands:
        # A path or command is of use only whole: the terminal may fold it, a copy of it has no line break.
        console.print(_printable(line, console), soft_wrap=True, highlight=False)


def _printable(line: Text, console: Console) -> Text:
    """`line` in characters that the terminal's encoding has."""
    utf = console.encoding.lower().startswith("utf")
    plain = (line.plain if utf else line.plain.translate(_PLAIN)).encode(console.encoding, "replace")
    return Text(plain.decode(console.encoding), spans=line.spans, style=line.style)


def _rule(title: str) -> Text:
    left = f"── {title} "
    return Text.assemble((left, "bold"), ("─" * max(0, WIDTH - len(left)), "dim"))


def _headline(run: RunFolder) -> list[Text]:
    scores, cost, (main, *_) = Text(), costs(run), score_tiles(run)
    for tile in score_tiles(run):
        label = tile.label.removesuffix(", average")
        scores.append(f"{label.lower() if label.istitle() and label.isalpha() else label} ", "dim")
        scores.append(f"{tile.value}   ", "bold cyan" if tile == main else "bold")
    scores.append(main.remark if known(main.value) else "", "dim")
    work = [
        known(cost["parameters"], "{} parameters" + known(cost["active parameters"], " ({} active)")),
        wording.count(run.steps, "step") if run.steps else "",
        known(cost["tokens"], "{} tokens"),
    ]
    pace = [known(cost["time"]), known(cost["tokens per second"], "{} tokens per second")]
    return [scores, *(Text(_joined(parts)) for parts in (work, pace) if any(parts))]


def _quality(run: RunFolder) -> list[Text]:
    """Scores by direction, or perplexity by language; of a single language the headline has it."""
    written = [line for table in answer_tables(run) for line in _answer_lines(table)]
    if written and not run.translates:
        return written
    if run.untestable or run.tuned:
        return []  # which a finding says, or nobody tests
    if not run.translates and (main_task(run).origin == "valid" or not main_task(run).task):
        return [Text("Not tested yet: the `test` command measures held-out perplexity.", "yellow"), Text()]
    table = next((table for table in rankings(run) if table.headers[0] in ("direction", "language")), None)
    if run.translates and not (table and table.rows):
        return [Text("No BLEU in this folder: the `test` command measures it.", "yellow")]
    if table is None or (not run.translates and len(table.rows) < 2):
        return []
    rows, half = table.rows, len(table.rows) if len(table.rows) <= 4 else -(-len(table.rows) // 2)
    left, right, heads = rows[:half], rows[half:], [table.headers[0]] * 2
    if len(rows) > _ALL:
        left, right = rows[:_EXTREMES], rows[: -_EXTREMES - 1 : -1]
        heads = ["best", "worst"] if run.translates else ["lowest", "highest"]
    columns = [_column(head, table, shown) for head, shown in zip(heads, (left, right), strict=True) if shown]
    lines = [Text("       ").join(parts) for parts in zip_longest(*columns, fillvalue=Text())]
    if len(rows) > _ALL and run.translates:
        lines += [_averages(run, word, side) for side, word in enumerate(("from", "into"))]
    elif len(rows) > _ALL:
        lines.append(Text(f"and {wording.count(len(rows) - 2 * _EXTREMES, 'language')} between", "dim"))
    return [*lines, Text(), *written]


def _answer_lines(table: Table) -> list[Text]:
    """The averages of a task's written answers, in one line."""
    line = Text()
    for label, value in zip(table.headers[1:], table.rows[-1][1:], strict=True):
        line.append(f"{label} ", "dim").append(f"{value}   ")
    return [line, Text()]


def _column(head: str, table: Table, rows: Sequence[Sequence[str]]) -> list[Text]:
    """Lines of one width: a head, then names and values."""
    widths = [13] if len(table.headers) == 2 else [6, 7]
    lines: list[Text] = []
    for name, *values in ((head, *table.headers[1:]), *rows):
        line = Text(name if len(name) <= 19 else f"{name[:18]}…")
        line.pad_right(20 - len(line))
        for i, (value, width) in enumerate(zip(values, widths, strict=True)):
            line.append(f"{value:>{width}}", "cyan" if lines and not i else "")
        line.stylize("" if lines else "dim")
        lines.append(line)
    return lines


def _averages(run: RunFolder, word: str, side: int) -> Text:
    """Average over the directions that share a source (side 0) or a target (side 1), the best first."""
    groups: dict[str, list[float]] = {}
    for direction, value in run.scores("bleu").directions.items():
        groups.setdefault(sides(direction)[side], []).append(value)
    means = {language: fmean(values) for language, values in groups.items()}
    line = Text(f"average {word} ", "dim")
    for i, language in enumerate(sorted(means, key=lambda x: -means[x])):
        piece = f"{'  ' if i else ''}{language} {means[language]:.0f}"
        if len(line) + len(piece) > WIDTH - 3:
            return line.append(" …")
        line.append(piece, "not dim")
    return line


def _tasks(run: RunFolder) -> list[Text]:
    """Last validation of every task, and what the test says of tasks beside the main one."""
    perplexities, losses = run.by_task("perplexity"), run.by_task("loss")
    name = "" if run.translates else " perplexity"
    told = [f"{task}{name} {wording.perplexity(value)}" for task, value in perplexities.items()]
    name = "" if run.translates else " loss"
    others = [f"{task}{name} {wording.significant(v)}" for task, v in losses.items() if task not in perplexities]
    if run.translates:
        rows = {"perplexity": told, "loss": others}
    else:
        rest = predictions(run)[1:]
        tested = [f"{x.task} {_score(x)}" for x in rest if x.origin == "test"]
        said = not rest and main_task(run).origin != "test"  # the headline has it
        rows = {"also tested": tested, "validation": [] if said else told + others}
    return [_labelled(label, _joined(parts)) for label, parts in rows.items() if parts]


def _knowledge(run: RunFolder) -> list[Text]:
    """How far the loss is above the floor, recall of facts, and agreement."""
    found = main_task(run)
    above = above_floor(run, found.task, found.loss, found.origin)
    floor = [] if above is None else [f"loss {wording.significant(found.loss)}, {wording.fixed(above, 3)} above it"]
    rows = {"floor": floor, "recall": recall_words(run)}
    lines = [_labelled(label, line) for label, lines in rows.items() for line in lines]
    return lines + [_labelled("" if i % 2 else "agreement", line) for i, line in enumerate(agreement_words(run))]


def _score(found: TaskScores) -> str:
    if found.perplexity is None:
        return f"loss {wording.significant(found.loss)}"
    return f"perplexity {wording.perplexity(found.perplexity)}"


def _routing(run: RunFolder) -> list[Text]:
    layers, routing, words = layer_health(run), dig(run.summary, "routing"), routing_words(run)
    if not layers and not (isinstance(routing, Mapping) and routing):
        return [_labelled("experts", "none: this model is dense")] if run.dense else []
    evenness = [x.evenness for x in layers if x.evenness is not None]
    entropies = [x.router_entropy for x in layers if x.router_entropy is not None]
    special = {x.name: x.specialisation for x in layers if x.specialisation is not None}
    even = fmean(evenness) if evenness else number(routing, "load_entropy")
    load = [
        known(words["dropped late in training"]).replace(" %", " % dropped"),
        _dead(run),
        f"load CV {words['load CV']}",
        known(words["experts per token"], "{} per token"),
    ]
    spread = [
        known(wording.fixed(even, 2), "evenness of load {} of 1"),
        f"router entropy {fmean(entropies):.2f} of log E" if entropies else "",
    ]
    lines = [_labelled("experts", _joined(load))]
    if any(spread):
        lines.append(_labelled("", _joined(spread)))
    if special:
        best = max(special, key=lambda name: special[name])
        text = f"{fmean(special.values()):.2f} of 1 by language; most in {best} ({special[best]:.2f})"
        lines.append(_labelled("specialised", text))
    if liked := typical_line(run):
        lines.append(_labelled("typical", liked))
    return lines


def _troubles(run: RunFolder) -> list[Text]:
    """The first troubles, and how many more there are."""
    found = [finding.text for finding in findings(run) if not finding.good]
    more = len(found) - _TROUBLES
    if more > 1:  # the line on one could as well be that one
        found[_TROUBLES:] = [f"and {more} more such findings, at the top of the report"]
    return [Text(f"! {text}", "yellow") for text in found]


def _dead(run: RunFolder) -> str:
    """``3 of 32 dead``; experts that a fixed rule passes over are not counted."""
    layers, counted = layer_health(run), number(run.summary, "routing", "dead_experts")
    learned = [x for x in layers if not x.fixed]
    if layers and not learned:
        return "assigned by a fixed rule"
    if len(learned) < len(layers) or counted is None:
        counted = float(sum(x.dead for x in learned))
    return f"{counted:.0f}" + (f" of {sum(x.num_experts for x in learned)}" if learned else "") + " dead"


def _next(run: RunFolder) -> list[Text]:
    """Commands for what one may want now: the report, the model at work, a comparison."""
    folder, page = wording.nearby(run.path), run.path / "report.html"
    shown = wording.nearby(page) if page.is_file() else command_line("report", folder)
    lines = [_labelled("report", shown, "bold")]
    if (was_cut := cut(run)) is not None and was_cut.command:
        lines.insert(0, _labelled("go on", was_cut.command, "bold"))
    if run.recipe and (run.path / "checkpoints").is_dir():
        best = run.scores("bleu").directions
        speaks = next(([*x.languages] for x in predictions(run) if x.task == "causal_lm"), None)
        if run.translates and best:
            source, target = sides(max(best, key=lambda d: best[d]))
            lines.append(_labelled("translate", command_line("generate", folder, "--from", source, "--to", target)))
        elif not run.translates and speaks is not None and (spoken := speaks or run.languages):
            lines += [
                _labelled("continue", command_line("generate", folder, "--from", spoken[0])),
                _labelled("", "reads prompts from standard input, one a line", "dim"),
            ]
    return [*lines, _labelled("compare", command_line("compare", folder, "OTHER_RUN"))]


def _joined(parts: Sequence[str]) -> str:
    return " · ".join(filter(None, parts))


def _labelled(label: str, content: str, style: str = "") -> Text:
    return Text.assemble((f"{label:<12}", "dim"), (content, style))
