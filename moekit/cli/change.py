"""The command change."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.surgery import change, output_options, run_option
from moekit.errors import UserError


def _options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument(
        "--set",
        action="append",
        required=True,
        metavar="KEY=VALUE",
        help="setting that needs no new weights, such as model.capacity_factor=2.0 or model.k=1; may be repeated",
    )
    output_options(parser)


def _change(given: Namespace, console: Console) -> None:
    from moekit.cli.recipes import reconfigured  # where it is used: a help text needs none of it
    from moekit.runs.surgery.operations import change_run

    for item in given.set:
        if "=" not in item.lstrip("="):
            raise UserError(f"--set must be KEY=VALUE: got {item!r}.")
    options = [f"--{item}" for item in given.set]
    change(given, console, lambda run: change_run(run, reconfigured(run.recipe, run.config, options)))


COMMAND = Command(
    "Change settings that need no new weights, such as the capacity factor",
    _options,
    _change,
    "  moekit change runs/tiny --set model.capacity_factor=2.0 --out runs/roomy",
)
