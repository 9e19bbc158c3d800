"""What a command of ``python -m moekit.surgery`` is."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class SurgeryCommand:
    """One command: its line in the help, its options, examples, and what it does.

    Attributes:
        help: one line.
        options: adds the options to the command's own parser.
        run: does it. A `moekit.errors.UserError` becomes a message and exit code 2; nothing may have been written then.
        examples: lines for the end of the command's help.
    """

    help: str
    options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Console], None]
    examples: str = ""
