"""The command merge."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.surgery import change, output_options, part_options, run_option
from moekit.errors import UserError

if TYPE_CHECKING:
    from moekit.runs.run import Run
    from moekit.runs.surgery.operations import Result


def _options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument("--by-load", action="store_true", help="weight experts by utilisation (default: equally)")
    part_options(parser)
    output_options(parser)


def _merge(given: Namespace, console: Console) -> None:
    from moekit.runs.surgery.operations import merge_run  # where it is used: a help text needs none of it
    from moekit.runs.surgery.utilisation import measured_load

    if not given.by_load and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: give --by-load with them.")

    def merged(run: Run) -> Result:
        return merge_run(run, measured_load(run, language=given.language, task=given.task) if given.by_load else None)

    change(given, console, merged)


COMMAND = Command(
    "Average the experts of each layer into a dense model",
    _options,
    _merge,
    "  moekit merge runs/tiny --by-load --restart --out runs/dense",
)
