"""The command score."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.training import folder_options, stored_run, stored_settings
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe
from moekit.runs.score import score


def _options(parser: ArgumentParser) -> None:
    folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language code of contexts")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="language code of continuations (default: --from)"
    )
    parser.add_argument(
        "--input",
        type=str,
        default="-",
        help='file of JSON lines {"context": text, "continuations": [text, ...], "answer": index from 0 (optional)}; '
        "- = standard input",
    )
    parser.add_argument(
        "--examples", type=str, default=None, help="JSON lines with answers, put before every context (few-shot)"
    )
    parser.add_argument("--output", type=str, default="-", help="output file of JSON lines; - = standard output")


def _score(recipe: Recipe, config: RunConfig, given: Any) -> None:
    score(
        stored_run(recipe, given),
        given.source_language,
        given.target_language,
        config=config,
        input=given.input,
        examples=given.examples,
        output=given.output,
    )


COMMAND = RecipeCommand(
    "Answer multiple-choice questions by the most likely continuation", _options, _score, ("evaluate.batch_tokens",),
    stored_settings,
)  # fmt: skip
