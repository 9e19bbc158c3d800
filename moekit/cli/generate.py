"""The command generate."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, location
from moekit.cli.prompt import converse
from moekit.cli.trained import (
    WRITER_SETTINGS,
    stored_run,
    stored_settings,
    text_given,
    text_options,
    writer_given,
    writer_options,
)
from moekit.data.lines import STANDARD

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    text_options(
        parser,
        "the input",
        "target language code; only for translation",
        "input file, with one sentence or prompt per line, plain or .gz, .xz, .bz2, .zst; - = standard input. "
        "Without it standard input is read; on a terminal lines are answered one by one",
        None,
    )
    parser.add_argument(
        "--output", type=location, default=STANDARD, help="output file, one line each; - = standard output"
    )
    parser.add_argument(
        "--n_best",
        type=int,
        help="number of texts per line that are written, best first, each as 'number ||| text ||| score', the number "
        "of the input line from 0; at most evaluate.beam_size (default: the best text alone, without a score)",
    )
    writer_options(parser)


def _generate(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.generate import generate  # a list of commands needs none of it
    from moekit.runs.writer import Writer

    run = stored_run(recipe, given)
    if given.input is None and given.output == STANDARD and sys.stdin is not None and sys.stdin.isatty():
        writer = Writer(run, config, **writer_given(given))
        converse(writer, given.source_language, given.target_language, given.n_best)
    else:
        generate(run, config=config, n_best=given.n_best, **text_given(given), **writer_given(given))


COMMAND = RecipeCommand(
    "Translate or continue text with a trained run", _options, _generate, WRITER_SETTINGS, stored_settings
)
