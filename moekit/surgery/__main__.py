"""``python -m moekit.surgery``: look into trained models and change them, from checkpoint to checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console

from moekit.cli.exchange import COMMANDS as EXCHANGE
from moekit.cli.surgery import COMMANDS as OF_RUNS
from moekit.cli.surgery_command import SurgeryCommand
from moekit.errors import UserError

COMMANDS: Mapping[str, SurgeryCommand] = {**OF_RUNS, **EXCHANGE}

_ABOUT = """Look into trained models and change them. What comes out is a run folder like those of recipes:

  python -m moekit.recipes.NAME test --out FOLDER
  python -m moekit.recipes.NAME generate --out FOLDER ...
  python -m moekit.recipes.NAME fit --config FOLDER/config.yaml --out FOLDER --resume --train.max_steps 4000
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m moekit.surgery",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        inner = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"examples:\n{command.examples}" if command.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.options(inner)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 where the input is at fault."""
    given = build_parser().parse_args(arguments)
    try:
        COMMANDS[given.command].run(given, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
