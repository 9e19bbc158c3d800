"""The command fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, say
from moekit.cli.training import smoke_option, smoke_settings, train
from moekit.shell import command_line
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _fit(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.training.processes import is_first_process  # a list of commands needs none of it

    run, _ = train(recipe, config, given)
    if is_first_process():
        say(Terminal(), f"trained; test it with: {command_line('test', run.path)}")


COMMAND = RecipeCommand(
    "Train a model, without test and report", smoke_option, _fit, start=smoke_settings, lasting=True
)
