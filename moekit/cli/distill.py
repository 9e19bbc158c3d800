"""The command distill."""

from __future__ import annotations

from moekit.cli.training import starting_command
from moekit.runs.distill import Distillation

COMMAND = starting_command(
    "Train a smaller model on text and the predictions of a trained run, then test and report",
    Distillation,
    "the student's",
    "folder or checkpoint of a trained run of any recipe. Its settings are the student's defaults (of another recipe "
    "only data and tasks), so give what makes the student smaller, for example --model.num_experts 0 or fewer layers",
)
