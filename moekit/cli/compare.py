"""The command compare."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moekit.cli.command import Command
from moekit.errors import UserError
from moekit.report import write_comparison


def compare(runs: Sequence[Path], out: Path | None = None) -> None:
    """Write a page and a markdown file that compare runs, and say where they are."""
    path = write_comparison(runs, out or Path("comparison.html"))
    print(f"{path}\n{path.with_suffix('.md')}")


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="two or more run folders, baseline first")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="HTML file to write (default: comparison.html); a markdown file is written beside it",
    )


def _compare(given: Namespace, console: Console) -> None:
    if len(given.runs) < 2:
        raise UserError("compare needs two or more runs: got one. For one run: python -m moekit report RUN.")
    compare(given.runs, given.out)


COMMAND = Command(
    "Compare several runs with the first one",
    _options,
    _compare,
    "  python -m moekit compare runs/tiny runs/tiny_dense --out results/comparison.html",
)
