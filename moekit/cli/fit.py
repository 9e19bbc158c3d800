"""The command fit."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from moekit.cli.command import RecipeCommand
from moekit.cli.training import train, training_options
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe
from moekit.training.processes import is_first_process


def _fit(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run, _ = train(recipe, config, given)
    if is_first_process():
        Console().print(f"trained; test it with: python -m moekit.recipes.{recipe.name} test --out {run.path}")


COMMAND = RecipeCommand("Train a model, without test and report", training_options, _fit, lasting=True)
