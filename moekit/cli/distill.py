"""The command distill."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.training import run_options, settings_of_other, test_and_report, train
from moekit.runs.config import RunConfig
from moekit.runs.distill import Distillation, DistillConfig, starting_config
from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    run_options(parser, "folder of the student's run (default: runs/RECIPE-VARIANT-distill)")
    parser.add_argument(
        "--teacher",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of a trained run of any recipe. Its settings are the student's defaults (of another "
        "recipe only data and tasks), so give what makes the student smaller, for example --model.num_experts 0 or "
        "fewer layers",
    )
    parser.add_class_arguments(DistillConfig, "distill")


def _distill(recipe: Recipe, config: RunConfig, given: Any) -> None:
    chosen = DistillConfig(**vars(given.distill))
    test_and_report(*train(recipe, config, given, "distill", lambda _, own: Distillation(given.teacher, chosen, own)))


COMMAND = RecipeCommand(
    "Train a smaller model on text and the predictions of a trained run, then test and report",
    _options,
    _distill,
    start=settings_of_other("--teacher", "distill", starting_config),
)
