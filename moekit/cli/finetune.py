"""The command finetune."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.training import run_options, settings_of_other, test_and_report, train
from moekit.runs.config import RunConfig
from moekit.runs.finetune import FineTuneConfig, FineTuning, starting_config
from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    run_options(parser, "folder of the new run (default: runs/RECIPE-VARIANT-finetune)")
    parser.add_argument(
        "--init_from",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of the run to start from. Its settings are the defaults, except for steps, schedule "
        "and learning rate, which suit a short fine-tuning",
    )
    parser.add_class_arguments(FineTuneConfig, "fine_tune")


def _finetune(recipe: Recipe, config: RunConfig, given: Any) -> None:
    chosen = FineTuneConfig(**vars(given.fine_tune))
    test_and_report(
        *train(
            recipe, config, given, "finetune",
            lambda settled, own: FineTuning(given.init_from, chosen, settled, own),
        )
    )  # fmt: skip


COMMAND = RecipeCommand(
    "Fine-tune a trained run, wholly, partly or with adapters, then test and report",
    _options,
    _finetune,
    start=settings_of_other("--init_from", "finetune", starting_config),
)
