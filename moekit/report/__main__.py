"""``python -m moekit.report``: make a report again, compare runs, or print a run as markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moekit.cli.command import run_command
from moekit.cli.program import REPORTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 where the input is at fault."""
    return run_command(REPORTS, "report", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
