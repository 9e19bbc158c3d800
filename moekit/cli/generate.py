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
from moekit.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.inference.sampling import Sampling
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
    parser.add_argument(
        "--temperature",
        type=float,
        help="draw tokens from the model's distribution, sharpened by this temperature, a finite number above 0 (1 = "
        "as it is), instead of searching for the most probable text",
    )
    parser.add_argument(
        "--top_k", type=int, help="number of most probable tokens to draw from, with --temperature (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="draw from the fewest tokens that reach this probability together, with --temperature (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the draws, with --temperature")
    writer_options(parser)


def _sampling(given: Any) -> Sampling | None:
    from moekit.inference.sampling import Sampling  # a list of commands needs none of it

    if given.temperature is None:
        for name in ("top_k", "top_p"):
            if getattr(given, name) is not None:
                raise UserError(f"--{name} is for drawing tokens: got it without --temperature. Give --temperature 1.")
        return None
    try:
        return Sampling(given.temperature, given.top_k, given.top_p, seed=given.seed)
    except ValueError as error:
        raise UserError(f"--temperature, --top_k and --top_p must be usable together: {error}") from None


def _generate(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.generate import generate  # a list of commands needs none of it
    from moekit.runs.writer import Writer

    run = stored_run(recipe, given)
    if given.input is None and given.output == STANDARD and sys.stdin is not None and sys.stdin.isatty():
        if config.train.devices > 1:
            raise UserError("--devices needs lines from --input or a pipe: got a terminal. Give --input.")
        writer = Writer(run, config, sampling=_sampling(given), **writer_given(given))
        converse(writer, given.source_language, given.target_language, given.n_best)
    else:
        options = {**text_given(given), **writer_given(given)}
        generate(run, config=config, n_best=given.n_best, sampling=_sampling(given), **options)


COMMAND = RecipeCommand(
    "Translate or continue text with a trained run",
    _options,
    _generate,
    ("train.devices", *WRITER_SETTINGS),
    stored_settings,
)
