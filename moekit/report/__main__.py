"""``python -m moekit.report``: make a report again, compare runs, or print a run as markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moekit.errors import UserError
from moekit.report import results_markdown, terminal_summary, write_comparison, write_report

_EPILOG = """examples:
  python -m moekit.report runs/tiny                       write runs/tiny/report.html, print the summary
  python -m moekit.report runs/tiny runs/tiny_dense       compare: comparison.html and comparison.md
  python -m moekit.report runs/tiny --markdown > tiny.md  numbers and samples, to commit
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 where the input is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m moekit.report",
        description=(
            "Draw the report of a finished, interrupted or running run from the files of its folder. With several "
            "folders, compare them: differences are against the first."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (what --out was)")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="with several runs: the HTML file to write (default: comparison.html); the markdown lies beside it",
    )
    parser.add_argument("--markdown", action="store_true", help="print one run as markdown instead of writing a page")
    given = parser.parse_args(arguments)
    try:
        if len(given.runs) == 1 and given.out is not None:
            raise UserError("--out is for comparisons: the report of one run is always RUN/report.html.")
        if given.markdown:
            if len(given.runs) > 1:
                raise UserError("--markdown prints one run: a comparison writes its markdown beside the page.")
            sys.stdout.write(results_markdown(given.runs[0]))
        elif len(given.runs) == 1:
            write_report(given.runs[0])
            terminal_summary(given.runs[0], Console())
        else:
            path = write_comparison(given.runs, given.out or Path("comparison.html"))
            print(f"{path}\n{path.with_suffix('.md')}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
