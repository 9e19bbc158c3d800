"""How moekit is started in the shell that the user is in: one form for every command that is printed."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

NAME = "moekit"
"""The console script, the same program as ``python -m moekit``."""
RECIPES = f"{NAME}.recipes."
"""Where the modules of recipes lie, each a program of its own."""


def program() -> str:
    """What starts moekit with the interpreter that runs, as text of a shell.

    ``moekit`` where the interpreter's own script is the first one on the PATH, else the path of that script (an
    environment that is not active), else the interpreter with ``-m moekit`` (moekit is no installed package).
    """
    own = shutil.which(NAME, path=sysconfig.get_path("scripts"))
    if own is None:
        return f"{_interpreter()} -m {NAME}"
    first = shutil.which(NAME)
    return NAME if first is not None and os.path.samefile(first, own) else _path(own)


def command_line(*words: str | Path) -> str:
    """A command of moekit as it can be typed: `program` and its quoted arguments."""
    return " ".join([program(), *(shlex.quote(str(word)) for word in words)])


def recipe_command(recipe: str, arguments: Sequence[str]) -> str:
    """The command line of a recipe's arguments, which begin with a command, or mean ``run``."""
    return command_line(*_by_name(recipe, arguments))


def typed_again(recorded: Sequence[str]) -> str:
    """A recorded command as it can be typed here and now; one that is no command of moekit stays what it is."""
    words = moekit_words(recorded) or list(recorded)
    start = program() if words[:1] == [NAME] else " ".join(map(_quoted, words[:1]))
    return " ".join([start, *map(_quoted, words[1:])])


def moekit_words(recorded: Sequence[str]) -> list[str]:
    """A recorded command in the form of the console script: program, command, recipe and so on; [] if it is none."""
    words = [*map(str, recorded)]
    if words[1:2] == ["-m"] and words[2:3] == [NAME]:
        words = [NAME, *words[3:]]
    elif words[1:2] == ["-m"] and words[2:] and words[2].startswith(RECIPES):
        words = [NAME, *_by_name(words[2].removeprefix(RECIPES), words[3:])]
    return words if words[:1] == [NAME] else []


def _by_name(recipe: str, arguments: Sequence[str]) -> list[str]:
    """Command and recipe before the options."""
    named = bool(arguments) and not arguments[0].startswith("-")
    return [arguments[0], recipe, *arguments[1:]] if named else ["run", recipe, *arguments]


def _interpreter() -> str:
    """``python`` or ``python3`` where they are the interpreter that runs, else its path."""
    here = os.path.abspath(sys.executable)  # not resolved: a virtual environment's is a link to another's
    names = (name for name in ("python", "python3") if os.path.abspath(shutil.which(name) or "") == here)
    return next(names, _path(here))


def _path(path: str) -> str:
    """A program's path: from the working folder where it lies in it, from the home folder where that is near."""
    file = Path(os.path.abspath(path))
    if file.is_relative_to(here := Path.cwd()):
        return shlex.quote(os.path.join(*(file.relative_to(here).parts if file.parent != here else (".", file.name))))
    return _quoted(f"~/{file.relative_to(Path.home())}") if file.is_relative_to(Path.home()) else shlex.quote(str(file))


def _quoted(word: str) -> str:
    """A word of which a shell makes itself; ``~`` at its start, and behind an option's ``=``, is the home folder."""
    option, equals, value = word.partition("=")
    if word.startswith("~/"):
        return f"~/{shlex.quote(word[2:])}"
    if equals and value.startswith("~/"):
        return f'{shlex.quote(option)}="$HOME"/{shlex.quote(value[2:])}'
    return shlex.quote(word)
