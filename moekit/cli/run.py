"""The command run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand
from moekit.cli.training import smoke_option, smoke_settings, test_and_report, train

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _run(recipe: Recipe, config: RunConfig, given: Any) -> None:
    test_and_report(*train(recipe, config, given))


COMMAND = RecipeCommand(
    "Train a model, test it on held-out text and write the report",
    smoke_option,
    _run,
    start=smoke_settings,
    lasting=True,
)
