"""The command compare."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.report import runs_options, write_compared
from moekit.errors import UserError


def _compare(given: Namespace, console: Console) -> None:
    if len(given.runs) < 2:
        raise UserError("compare needs two or more runs: got one. For one run: python -m moekit report RUN.")
    write_compared(given)


COMMAND = Command(
    "Compare several runs with the first one",
    lambda parser: runs_options(parser, "two or more run folders, baseline first", "to write"),
    _compare,
    "  python -m moekit compare runs/tiny runs/tiny_dense --out results/comparison.html",
)
