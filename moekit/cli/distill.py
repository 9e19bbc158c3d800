"""The command distill."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.cli.training import starting_command

if TYPE_CHECKING:
    from moekit.runs.distill import Distillation


def _start() -> type[Distillation]:
    from moekit.runs.distill import Distillation  # a list of commands needs none of it

    return Distillation


COMMAND = starting_command(
    "Train a smaller model on text and the predictions of a trained run, then test and report",
    _start,
    "the student's",
    "folder or checkpoint of a trained run of any recipe. Its settings are the student's defaults (of another recipe "
    "only data and tasks), so give what makes the student smaller, for example --model.num_experts 0 or fewer layers",
)
