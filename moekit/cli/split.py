"""The command split."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, number
from moekit.cli.surgery import change, output_options, run_option


def _options(parser: ArgumentParser) -> None:
    run_option(parser, "; the recipe must have the setting model.k")
    parser.add_argument(
        "--parts",
        type=number(int, at_least=1),
        required=True,
        help="parts per expert; experts per token (model.k) grow by this factor",
    )
    parser.add_argument(
        "--whole-weights",
        action="store_true",
        help="give each part the full routing weight of its expert, for routers with unnormalised sigmoid scores",
    )
    output_options(parser)


def _split(given: Namespace, console: Console) -> None:
    from moekit.runs.surgery.operations import split_run  # where it is used: a help text needs none of it

    change(given, console, lambda run: split_run(run, given.parts, divided=not given.whole_weights))


COMMAND = Command(
    "Split each expert into several smaller ones",
    _options,
    _split,
    "  moekit split runs/shazeer-tiny --parts 2 --out runs/fine",
)
