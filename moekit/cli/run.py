"""The command run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand
from moekit.cli.training import smoke_option, smoke_settings, test_and_report, train

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


_TWIN = (
    "then train the variant's dense twin with the same seeds and steps, into a folder of its own, and write one page "
    "on both, twin.html in the folder of the first"
)


def _options(parser: ArgumentParser) -> None:
    smoke_option(parser)
    parser.add_argument("--twin", action="store_true", help=_TWIN)


def _run(recipe: Recipe, config: RunConfig, given: Any) -> None:
    if given.twin:
        from moekit.cli.twin import train_with_twin  # where it is used: most runs have none

        train_with_twin(recipe, config, given)
    else:
        test_and_report(*train(recipe, config, given))


COMMAND = RecipeCommand(
    "Train a model, test it on held-out text and write the report",
    _options,
    _run,
    start=smoke_settings,
    lasting=True,
)
