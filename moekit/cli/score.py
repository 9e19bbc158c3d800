"""The command score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, location
from moekit.cli.trained import stored_run, stored_settings, text_given, text_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    text_options(
        parser,
        "contexts",
        "language code of continuations (default: --from)",
        'file of JSON lines {"context": text, "continuations": [text, ...], "answer": index from 0 (optional)}; '
        "- = standard input",
    )
    parser.add_argument(
        "--examples", type=location, help="JSON lines with answers, put before every context (few-shot)"
    )
    parser.add_argument("--output", type=location, default="-", help="output file of JSON lines; - = standard output")


def _score(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.score import score  # a list of commands needs none of it

    score(stored_run(recipe, given), config=config, examples=given.examples, **text_given(given))


COMMAND = RecipeCommand(
    "Answer multiple-choice questions by the most likely continuation", _options, _score,
    ("evaluate.batch_tokens",), stored_settings,
)  # fmt: skip
