"""The command report."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from moekit.cli.command import Command, path
from moekit.errors import UserError
from moekit.terminal import visible, write_data


def runs_options(parser: ArgumentParser, runs: str, page: str) -> None:
    """Runs, and the page that compares them."""
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help=runs)
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help=f"HTML file {page} (default: comparison.html); a markdown file is written beside it",
    )


def write_compared(given: Namespace) -> None:
    """Write a page and a markdown file that compare the runs, and say where they are."""
    from moekit.report import write_comparison  # where it is used: a help text draws nothing

    path = write_comparison(given.runs, given.out or Path("comparison.html"))
    print(visible(f"{path}\n{path.with_suffix('.md')}"))


def _options(parser: ArgumentParser) -> None:
    runs_options(parser, "folder of a run, or of a fine-tuned model (its --out)", "of a comparison")
    parser.add_argument("--markdown", action="store_true", help="print one report as markdown instead of writing HTML")


def _report(given: Namespace, console: Console) -> None:
    first, *others = given.runs
    if not others and given.out is not None:
        raise UserError("--out is for comparisons: the report of one run is always RUN/report.html.")
    if others and given.markdown:
        raise UserError("--markdown prints one run: a comparison writes its markdown beside the page.")
    from moekit.report import results_markdown, terminal_summary, write_report  # a help text draws nothing

    if others:
        write_compared(given)
    elif given.markdown:
        write_data(results_markdown(first))
    else:
        write_report(first)
        terminal_summary(first, console)


COMMAND = Command(
    "Write the report of a run, finished or not; compare several runs with the first",
    _options,
    _report,
    "  moekit report runs/tiny                       write runs/tiny/report.html, print the summary\n"
    "  moekit report runs/tiny runs/tiny_dense       compare: comparison.html and comparison.md\n"
    "  moekit report runs/tiny --markdown > tiny.md  numbers and samples, to commit",
)
