"""The command generate."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.trained import SEARCH, stored_run, stored_settings, text_given, text_options
from moekit.runs.config import RunConfig
from moekit.runs.generate import generate
from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    text_options(
        parser,
        "the input",
        "target language code; only for translation",
        "input file, with one sentence or prompt per line; - = standard input",
    )
    parser.add_argument("--output", type=str, default="-", help="output file, one line each; - = standard output")
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="maximum number of experts per layer kept in memory; others are mapped from disk when tokens need them. "
        "0 = keep all",
    )


def _generate(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run = stored_run(recipe, given)
    generate(run, config=config, experts_in_memory=given.experts_in_memory, **text_given(given))


GENERATE = RecipeCommand(
    "Translate or continue text with a trained run", _options, _generate, ("train.accelerator", *SEARCH),
    stored_settings,
)  # fmt: skip
