"""One program: every command under ``moekit``, which is ``python -m moekit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moekit.cli import (
    ablate,
    aggregate,
    change,
    compare,
    curve,
    export,
    import_,
    inspect,
    merge,
    plan,
    prune,
    recipes,
    report,
    run_all,
    split,
    upcycle,
)
from moekit.cli.command import Command, execute, is_help, option_value, overview, run_command
from moekit.errors import UserError, nearest
from moekit.runs.known import recipe_about, recipe_names, require_known
from moekit.shell import command_line, program

if TYPE_CHECKING:
    from moekit.runs.recipe import Recipe

SURGERY: Mapping[str, Command] = {
    "inspect": inspect.COMMAND,
    "aggregate": aggregate.COMMAND,
    "prune": prune.COMMAND,
    "upcycle": upcycle.COMMAND,
    "merge": merge.COMMAND,
    "split": split.COMMAND,
    "change": change.COMMAND,
    "curve": curve.COMMAND,
    "export": export.COMMAND,
    "import": import_.COMMAND,
}
REPORTS: Mapping[str, Command] = {"report": report.COMMAND, "compare": compare.COMMAND}
STUDIES: Mapping[str, Command] = {"ablate": ablate.COMMAND}
FOLDERS: Mapping[str, Command] = {"plan": plan.FOLDER_COMMAND}
"""Commands on recipes that take the folder of a model instead, by ``--model``."""
_RUNS = ("test", "generate", "serve", "score", "routing")
"""Commands that use a run, whose folder names its recipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 where the input is at fault."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if is_help(given):
        return execute(lambda: print(_about()))
    name, *rest = given
    if name in _RUNS and _names_folder(rest):
        rest = ["--out", *rest]
    runs = {**SURGERY, **REPORTS, **STUDIES}
    if name in runs:
        return run_command(runs, name, rest)
    if name in FOLDERS and rest and rest[0].startswith("-") and _names_model(rest):
        return run_command(FOLDERS, name, rest)
    if name == "run" and rest[:1] == [run_all.ALL]:
        return run_all.run_all(rest[1:])
    if rest and is_help(rest) and name in recipes.COMMANDS:
        print(_about_command(name))
        return 0
    found: list[Recipe] = []
    return execute(lambda: found.append(_recipe(name, rest))) or recipes.main(
        found[0], [name, *rest[rest[:1] == [found[0].name] :]]
    )


def surgery(arguments: Sequence[str] | None = None) -> int:
    """``python -m moekit.surgery``: its commands alone."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if is_help(given):
        print(_surgery_about())
        return 0 if given else 2
    if given[0] not in SURGERY:
        return execute(lambda: _unknown(given[0], SURGERY))
    return run_command(SURGERY, given[0], given[1:])


def _recipe(command: str, arguments: Sequence[str]) -> Recipe:
    """The recipe that the arguments begin with, or that of the run that is used."""
    if command not in recipes.COMMANDS:
        _unknown(command, {**recipes.COMMANDS, **SURGERY, **REPORTS, **STUDIES})
    if arguments and not arguments[0].startswith("-"):
        if command in _RUNS and arguments[0] not in recipe_names():
            raise UserError(
                f"{command} needs a recipe or the folder of a run: {arguments[0]!r} is neither. "
                f"{nearest(arguments[0], recipe_names())}"
            )
        require_known(arguments[0], command)
        from moekit.runs.recipe import find_recipe  # a refusal needs none of it

        return find_recipe(arguments[0], command)
    if command in _RUNS and (out := option_value(arguments, "--out")):
        from moekit.runs.run import Run

        return Run.open(out).recipe
    folder = " or --out FOLDER" if command in _RUNS else ""
    raise UserError(f"{command} needs a recipe{folder}: {command_line(command, 'NAME')}. {nearest('', recipe_names())}")


def _names_folder(arguments: Sequence[str]) -> bool:
    """Whether the first argument is the folder of a run, or meant to be one, and no recipe."""
    first = arguments[0] if arguments else "-"
    return not first.startswith("-") and first not in recipe_names() and (os.path.lexists(first) or os.sep in first)


def _names_model(arguments: Sequence[str]) -> bool:
    """Whether ``--model`` is among the options; those of a recipe's model have a name behind it."""
    return any(argument.partition("=")[0] == "--model" for argument in arguments)


def _unknown(name: str, known: Mapping[str, object]) -> None:
    raise UserError(f"unknown command {name!r}. {nearest(name, known)}")


def _about() -> str:
    rows = {
        "commands on recipes": {name: command.help for name, command in recipes.COMMANDS.items()},
        "commands on trained models": {name: command.help for name, command in SURGERY.items()},
        "reports": {name: command.help for name, command in REPORTS.items()},
        "studies": {name: command.help for name, command in STUDIES.items()},
        "recipes": {name: recipe_about(name) for name in recipe_names()},
    }
    lists = "\n\n".join(f"{title}:\n{overview(lines)}" for title, lines in rows.items())
    return (
        f"usage: {program()} COMMAND [RECIPE] [--option value ...]\n\n"
        f"{lists}\n\n"
        "Commands on recipes are followed by a recipe. test, generate, serve, score and routing also take the folder "
        f"of a run: {command_line('generate', 'FOLDER')}. {command_line('run', run_all.ALL, '--smoke')} tries every "
        "recipe in seconds.\n"
        "inspect, prune, merge, upcycle and curve also take the folder of a transformers model, as "
        f"{command_line('plan', '--model', 'FOLDER')} does.\n"
        "To list the options, add --help after the command (and its recipe, if it needs one)."
    )


def _about_command(name: str) -> str:
    """Help of a command on recipes without a recipe, whose settings are the options."""
    return (
        f"usage: {command_line(name)} RECIPE [--variant NAME] [--option value ...]\n\n"
        f"{recipes.COMMANDS[name].help}.\n\n"
        f"recipes:\n{overview({each: recipe_about(each) for each in recipe_names()})}\n\n"
        f"{command_line(name)} RECIPE --help lists the options and the variants of a recipe."
    )


def _surgery_about() -> str:
    return f"""usage: {program()} COMMAND ...

Inspect trained models and change them. A changed model is written as a run folder that recipe commands can use:

  {program()} test FOLDER
  {program()} generate FOLDER
  {program()} fit NAME --config FOLDER/config.yaml --out FOLDER --resume --train.max_steps 4000

commands:
{overview({name: command.help for name, command in SURGERY.items()})}

{program()} COMMAND --help lists the options of that command."""
