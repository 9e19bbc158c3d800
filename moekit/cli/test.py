"""The command test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, say
from moekit.cli.trained import SEARCH, folder_option, stored_run, stored_settings
from moekit.cli.training import test_and_report
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _test(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.text import corpus_note  # a list of commands needs none of it
    from moekit.training.processes import is_first_process

    run = stored_run(recipe, given)
    if is_first_process() and (note := corpus_note(run)):
        say(Terminal(), f"{run.path}: {note}")
    test_and_report(run, config)


COMMAND = RecipeCommand(
    "Test a trained run and rewrite its report",
    folder_option,
    _test,
    ("train.devices", "train.num_nodes", "train.accelerator", *SEARCH, "evaluate.samples", "evaluate.bleu_tokenizer"),
    stored_settings,
    lasting=True,
)
