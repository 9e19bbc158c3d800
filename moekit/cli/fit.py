"""The command fit."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from moekit.cli.command import RecipeCommand, say
from moekit.cli.training import train, training_options
from moekit.runs.config import RunConfig
from moekit.runs.fit import is_first_process
from moekit.runs.recipe import Recipe
from moekit.runs.shell import command_line


def _fit(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run, _ = train(recipe, config, given)
    if is_first_process():
        say(Console(), f"trained; test it with: {command_line('test', run.path)}")


COMMAND = RecipeCommand("Train a model, without test and report", training_options, _fit)
