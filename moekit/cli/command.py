"""What a command is, how it ends, and the options that several have."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse
from rich.console import Console

from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe
from moekit.runs.shell import NAME, command_line, program

EXAMPLE = re.compile(rf"(?<=^  ){NAME}\b", re.MULTILINE)
"""Where a line of `Command.examples` names the program."""


@dataclass(frozen=True)
class Command:
    """A command on runs or folders.

    Attributes:
        help: one line, a sentence without its period.
        options: adds the options to the command's own parser.
        run: does it. A `moekit.errors.UserError` becomes a message and exit code 2; nothing may have been written then.
        examples: lines for the end of the command's help; those that begin with "  moekit" are commands.
    """

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], None]
    examples: str = ""


@dataclass(frozen=True)
class RecipeCommand:
    """A command of a recipe.

    Attributes:
        help: one line, a sentence without its period.
        options: adds its own options.
        run: does it with the recipe, the settings and all options.
        settings: dotted keys of the settings that it uses, which are options of it too; None = all, and a YAML file may
            give them.
        start: from the recipe, the arguments and the variant that they name, the variant and the settings that are the
            defaults, or None; None = those of the variant.
    """

    help: str
    options: Callable[[jsonargparse.ArgumentParser], None]
    run: Callable[[Recipe, RunConfig, Any], None]
    settings: Sequence[str] | None = None
    start: Callable[[Recipe, Sequence[str], str | None], tuple[str, RunConfig] | None] | None = None


def execute(command: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0, or 2 where the input is at fault, which one message says.

    130 = it was interrupted. 141 = nobody reads its output any more, as shells count it; nothing is said then.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 141
    except UserError as error:
        console.print("[bold red]error:[/] " + str(error).replace("[", r"\["))
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    return 0


def _discard_output() -> None:
    """Let what is still to be printed go nowhere: the interpreter flushes standard output when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def build_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of a command on runs."""
    parser = argparse.ArgumentParser(
        prog=command_line(name),
        description=f"{command.help}.",
        epilog=f"examples:\n{EXAMPLE.sub(program(), command.examples)}" if command.examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    return parser


def run_command(commands: Mapping[str, Command], name: str, arguments: Sequence[str]) -> int:
    """Parse the options of a command on runs, and run it; returns the exit code."""
    given = build_parser(name, commands[name]).parse_args(arguments)
    return execute(lambda: commands[name].run(given, Console()))


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of ``--option V`` or ``--option=V``, the last one given; None = it is not given.

    Raises:
        UserError: it has no value.
    """
    found = None
    for place, item in enumerate(arguments):
        if item == option:
            if place + 1 == len(arguments):
                raise UserError(f"{option} needs a value.")
            found = arguments[place + 1]
        elif item.startswith(f"{option}="):
            found = item.partition("=")[2]
    return found


def is_help(arguments: Sequence[str]) -> bool:
    """Whether nothing but help is asked for."""
    return list(arguments) in ([], ["-h"], ["--help"])


def overview(lines: Mapping[str, str]) -> str:
    """Names and what is said of them, as rows of a help text."""
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())


def say(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
