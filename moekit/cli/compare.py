"""The command compare."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.report import runs_options, write_compared
from moekit.errors import UserError
from moekit.shell import command_line


def _compare(given: Namespace, console: Console) -> None:
    if len(given.runs) < 2:
        one = command_line("report", given.runs[0])
        raise UserError(f"compare needs two or more runs: got one. For one run: {one}")
    write_compared(given)


COMMAND = Command(
    "Compare several runs with the first one",
    lambda parser: runs_options(parser, "two or more run folders, baseline first", "to write"),
    _compare,
    "  moekit compare runs/tiny runs/tiny_dense --out results/comparison.html",
)
