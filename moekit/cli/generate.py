"""The command generate."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.training import folder_options, stored_run, stored_settings
from moekit.runs.config import RunConfig
from moekit.runs.generate import generate
from moekit.runs.recipe import Recipe

_SETTINGS = ("train.accelerator", "evaluate.beam_size", "evaluate.length_penalty", "evaluate.batch_tokens")


def _options(parser: ArgumentParser) -> None:
    folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language code of the input")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="target language code; only for translation"
    )
    parser.add_argument(
        "--input", type=str, default="-", help="input file, with one sentence or prompt per line; - = standard input"
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
    generate(
        stored_run(recipe, given),
        given.source_language,
        given.target_language,
        config=config,
        input=given.input,
        output=given.output,
        experts_in_memory=given.experts_in_memory,
    )


COMMAND = RecipeCommand(
    "Translate or continue text with a trained run", _options, _generate, _SETTINGS, stored_settings
)
