"""The command generate."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.prompt import converse
from moekit.cli.training import folder_options, stored_run, stored_settings
from moekit.data.lines import STANDARD
from moekit.runs.config import RunConfig
from moekit.runs.generate import generate
from moekit.runs.recipe import Recipe
from moekit.runs.writer import Writer

SETTINGS = ("train.accelerator", "evaluate.beam_size", "evaluate.length_penalty", "evaluate.batch_tokens")


def _options(parser: ArgumentParser) -> None:
    folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language code of the input")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="target language code; only for translation"
    )
    parser.add_argument(
        "--input",
        type=str,
        default=None,
        help="input file, with one sentence or prompt per line, plain or .gz, .xz, .bz2, .zst; - = standard input. "
        "Without it standard input is read; on a terminal lines are answered one by one",
    )
    parser.add_argument("--output", type=str, default=STANDARD, help="output file, one line each; - = standard output")
    writer_options(parser)


def writer_options(parser: ArgumentParser) -> None:
    """The options of commands that write text with a run."""
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="maximum number of experts per layer kept in memory; others are mapped from disk when tokens need them. "
        "0 = keep all",
    )
    parser.add_argument(
        "--max_input_tokens",
        type=int,
        default=None,
        help="maximum number of tokens of an input line; longer lines are cut, and a message says so (default: 1024, "
        "or data.max_length if that is more)",
    )


def _generate(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run = stored_run(recipe, given)
    bounds = {"experts_in_memory": given.experts_in_memory, "max_input_tokens": given.max_input_tokens}
    if given.input is None and given.output == STANDARD and sys.stdin is not None and sys.stdin.isatty():
        converse(Writer(run, config, **bounds), given.source_language, given.target_language)
        return
    generate(
        run,
        given.source_language,
        given.target_language,
        config=config,
        input=STANDARD if given.input is None else given.input,
        output=given.output,
        **bounds,
    )


COMMAND = RecipeCommand("Translate or continue text with a trained run", _options, _generate, SETTINGS, stored_settings)
