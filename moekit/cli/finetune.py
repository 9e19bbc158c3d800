"""The command finetune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.cli.training import starting_command

if TYPE_CHECKING:
    from moekit.runs.finetune import FineTuning


def _start() -> type[FineTuning]:
    from moekit.runs.finetune import FineTuning  # a list of commands needs none of it

    return FineTuning


COMMAND = starting_command(
    "Fine-tune a trained run, wholly, partly or with adapters, then test and report",
    _start,
    "the new",
    "folder or checkpoint of the run to start from. Its settings are the defaults, except for steps, schedule and "
    "learning rate, which suit a short fine-tuning",
)
