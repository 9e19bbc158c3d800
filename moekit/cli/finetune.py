"""The command finetune."""

from __future__ import annotations

from moekit.cli.training import starting_command
from moekit.runs.finetune import FineTuning

COMMAND = starting_command(
    "Fine-tune a trained run, wholly, partly or with adapters, then test and report",
    FineTuning,
    "the new",
    "folder or checkpoint of the run to start from. Its settings are the defaults, except for steps, schedule and "
    "learning rate, which suit a short fine-tuning",
)
