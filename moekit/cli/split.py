"""The command split."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.surgery import change, output_options, run_option
from moekit.runs.surgery.operations import split_run


def _options(parser: ArgumentParser) -> None:
    run_option(parser, "; its recipe has a setting model.k")
    parser.add_argument(
        "--parts", type=int, required=True, help="parts of each expert; a token chooses so many times more"
    )
    parser.add_argument(
        "--whole-weights",
        action="store_true",
        help="give each part the whole weight of its expert, for routers whose sigmoid scores are not scaled",
    )
    output_options(parser)


def _split(given: Namespace, console: Console) -> None:
    change(given, console, lambda run: split_run(run, given.parts, divided=not given.whole_weights))


COMMAND = Command(
    "Cut experts into finer ones",
    _options,
    _split,
    "  python -m moekit split runs/shazeer-tiny --parts 2 --out runs/fine",
)
