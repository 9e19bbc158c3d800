"""Translating or continuing lines of text with a trained run, from file to file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.atomic import require_writable
from moekit.data.lines import STANDARD, one_line, read_lines, write_lines
from moekit.errors import UserError
from moekit.inference.interface import Hypothesis
from moekit.inference.sampling import Sampling
from moekit.runs.config import RunConfig
from moekit.runs.run import Run
from moekit.runs.spread import write_together
from moekit.runs.writer import Writer
from moekit.terminal import Terminal, visible
from moekit.training.processes import is_first_process


def generate(
    run: Run,
    source: str | None,
    target: str | None = None,
    *,
    config: RunConfig | None = None,
    input: str = STANDARD,
    output: str = STANDARD,
    experts_in_memory: int = 0,
    max_input_tokens: int | None = None,
    n_best: int | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Translate a file or standard input, line by line, in order; a language model continues each line.

    A line break that is written stands as a space, so that line n of the output belongs to line n of the input. With
    `n_best` a line of the output is ``number ||| text ||| score``, the number of the input's line from 0, as in the
    n-best lists of Moses and Marian; a line of the input has as many as were found, best first.

    Args:
        run: the run.
        source: language of the input.
        target: language wanted, of runs that translate.
        config: its settings, where they are not the run's: another beam, for example.
        input: the file, as `moekit.data.lines.read_lines` reads it; - = standard input.
        output: the file; - = standard output.
        experts_in_memory: so many experts of each layer at most, the others mapped from disk; 0 = all.
        max_input_tokens: most tokens of a line; see `Writer`.
        n_best: texts of each line, with their scores; None = the best one alone.
        sampling: draws tokens, instead of the search that the settings describe.

    With several devices (``config.train.devices``) the first process reads and writes the files.

    Raises:
        UserError: more texts are wanted than the beam is wide, a language is missing or unknown, the input cannot be
            read, the output cannot be written, or the run writes no text.
    """
    if output != STANDARD:
        require_writable(Path(output))
    config = config or run.config
    several, first = config.train.devices * config.train.num_nodes > 1, is_first_process()
    if several and experts_in_memory:
        raise UserError(
            "--experts_in_memory is for one process: got --devices with it. Of several each holds a part of the "
            "experts. Leave one of the two out."
        )
    writer = Writer(
        run, config, experts_in_memory=experts_in_memory, max_input_tokens=max_input_tokens, sampling=sampling
    )
    source, target = writer.require_languages(source, target)
    if n_best is not None:
        writer.require_n_best(n_best)
    lines = read_lines(input) if first else []  # of several processes all get those of the first one
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Terminal(stderr=True),
        transient=True,
        disable=not (first and sys.stderr.isatty()),
    )
    with bar:
        task = bar.add_task(source if target is None else f"{source} to {target}", total=len(lines))
        advance = partial(bar.advance, task)
        write = partial(writer.write, source=source, target=target, n_best=n_best, advance=advance)
        written = write_together(writer, config, lines, write) if several else write(lines)
    if not first:
        return
    if warning := writer.warning(written.cut, "standard input" if input == STANDARD else f"--input {input}"):
        print(visible(warning), file=sys.stderr)
    write_lines(output, map(one_line, written.texts) if n_best is None else n_best_lines(written.hypotheses))


def n_best_lines(hypotheses: Sequence[Sequence[Hypothesis]]) -> list[str]:
    """Lines ``number ||| text ||| score``: see `generate`."""
    return [
        f"{number} ||| {one_line(found.text)} ||| {found.score:.6g}"
        for number, texts in enumerate(hypotheses)
        for found in texts
    ]
