"""What a command is, how it ends, and the options that several have."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.text import Text

from moekit.atomic import path_error
from moekit.errors import NonFiniteError, TrainingStoppedError, UserError
from moekit.output import discard, lasting_output
from moekit.performance import keep_memory
from moekit.runs.settings.fields import missed_range
from moekit.shell import NAME, command_line, program
from moekit.terminal import Terminal, visible, visible_remarks

if TYPE_CHECKING:
    import jsonargparse

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe

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
        lasting: whether it goes on where nobody reads its output any more.
    """

    help: str
    options: Callable[[jsonargparse.ArgumentParser], None]
    run: Callable[[Recipe, RunConfig, Any], None]
    settings: Sequence[str] | None = None
    start: Callable[[Recipe, Sequence[str], str | None], tuple[str, RunConfig] | None] | None = None
    lasting: bool = False


def execute(command: Callable[[], None]) -> int:
    """Run a command and return its exit code: 0, or 2 where the input is at fault, which one message says.

    1 = training stopped, which one message says too. 130 = it was interrupted.
    141 = nobody reads its output any more, as shells count it; nothing is said then.
    """

    def tell(*text: str | tuple[str, str]) -> None:
        with lasting_output():
            Terminal(stderr=True, soft_wrap=True).print(Text.assemble(*text))

    keep_memory()
    try:
        try:
            with visible_remarks():
                command()
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            discard(sys.stdout)
            return 141
        except OSError as error:
            if (said := path_error(error)) is None:
                raise
            raise said from error
    except UserError as error:
        tell(("error: ", "bold red"), visible(str(error)))
        return 2
    except TrainingStoppedError as error:
        from moekit.training.processes import is_first_process  # training has imported it

        if is_first_process() or not isinstance(error, NonFiniteError):  # which all raise alike
            tell(("stopped: ", "bold red"), visible(str(error)))
        return 1
    except KeyboardInterrupt:
        with _last_words():
            tell("interrupted")
        return 130
    except SystemExit as end:
        with _last_words():
            if not isinstance(end.__context__, KeyboardInterrupt):  # in training, where Lightning makes 1 of it
                raise
            tell("interrupted")
        return 130
    return 0


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """Inside, and while the interpreter shuts down, no further Ctrl-C breaks in.

    Shutting down takes a second with torch, and a signal then would end the process as if nobody had dealt with it.
    """
    former = _hold_off_interrupts()
    atexit.register(_hold_off_interrupts)
    try:
        yield
    finally:
        if former is not None:
            signal.signal(signal.SIGINT, former)


def _hold_off_interrupts() -> Any:
    """Ignore SIGINT from now on; what was done with it before, or None where that is somebody else's business."""
    if threading.current_thread() is not threading.main_thread():
        return None
    while True:
        try:
            return signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # one that was on its way
            continue


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. {self.prog} --help lists the options.")


class _ValueError(argparse.ArgumentTypeError, ValueError):
    """A value that an option cannot have; argparse and jsonargparse each know one of the bases."""


class number:  # noqa: N801 - the type of an option, as int and float are
    """The type of an option that is a number in a range, which is given as in `moekit.runs.settings.setting`."""

    def __init__(self, kind: type[int] | type[float], **known: float) -> None:
        self.kind, self.known = kind, known
        self.words = "a whole number" if kind is int else "a number"

    def __call__(self, text: str) -> float:
        """The number that the text is."""
        try:
            found = self.kind(text)
        except (ValueError, OverflowError):
            raise _ValueError(f"must be {self.words}: got {text!r}") from None
        if missed := missed_range(found, self.known):
            range_words = f", {missed}" if self.known else ""
            raise _ValueError(f"must be {self.words}{range_words}: got {text}")
        return found


class _Location:
    """The type of an option that names a file or a folder: an empty text would be the folder of the shell."""

    def __call__(self, text: str) -> str:
        """The name, if it can be one."""
        if not text or "\0" in text:
            raise _ValueError(f"must name a file or a folder: got {text!r}")
        return text

    def __repr__(self) -> str:
        """Shown in help texts."""
        return "path"


location = _Location()


def path(text: str) -> Path:
    """As `location`."""
    return Path(location(text))


def build_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of a command on runs."""
    parser = _Parser(
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
    parser = build_parser(name, commands[name])
    return execute(lambda: commands[name].run(parser.parse_args(arguments), Terminal()))


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """The last one of `option_values`; None = it is not given."""
    return next(reversed(option_values(arguments, option)), None)


def option_values(arguments: Sequence[str], option: str) -> list[str]:
    """The values of ``--option V`` and ``--option=V``, in their order.

    Raises:
        UserError: one is missing.
    """
    given = [(item, after) for item, after in zip_longest(arguments, arguments[1:]) if item.partition("=")[0] == option]
    values = [after if item == option else item.partition("=")[2] for item, after in given]
    if not all(values):
        raise UserError(f"{option} needs a value.")
    return [str(value) for value in values]


def is_help(arguments: Sequence[str]) -> bool:
    """Whether nothing but help is asked for."""
    return list(arguments) in ([], ["-h"], ["--help"])


def overview(lines: Mapping[str, str]) -> str:
    """Names and what is said of them, as rows of a help text."""
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())


def say(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(visible(text), highlight=False, markup=False, soft_wrap=True)
