"""The command line that every recipe shares: commands, variants, YAML, and errors that help."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console

from moekit.errors import UserError
from moekit.recipes._ranges import check_ranges
from moekit.training.run_folder import plain

C = TypeVar("C")


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's help with the description's own line breaks."""


@dataclass(frozen=True)
class Command:
    """One thing a recipe can do: its line in the help, its own options, and the function that does it."""

    help: str
    run: Callable[[Any, Namespace], int | None]
    options: Callable[[ArgumentParser], None] = lambda parser: None
    # From recipe, arguments and wanted variant: variant and settings that are the defaults; None = the variant's.
    defaults: Callable[[Recipe[Any], Sequence[str], str | None], tuple[str, Any] | None] = lambda *given: None


@dataclass(frozen=True)
class Recipe(Generic[C]):
    """A recipe as the command line sees it.

    Attributes:
        name: as in ``python -m moekit.recipes.<name>``.
        about: one paragraph for the help.
        variants: settings by name; the first is the default.
        notes: one line about each variant for the help.
        commands: by name; the first is the default.
    """

    name: str
    about: str
    variants: Mapping[str, C]
    notes: Mapping[str, str]
    commands: Mapping[str, Command]


_SHORT = {"--devices": "--train.devices", "--nodes": "--train.num_nodes"}
"""Options that have a short name, as in ``torchrun``."""


def _spelled_out(argument: str) -> str:
    """The argument with its option's full name."""
    option, equals, value = argument.partition("=")
    return _SHORT.get(option, option) + equals + value


def take(argv: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of ``--option V`` or ``--option=V``, and the other arguments."""
    rest: list[str] = []
    value: str | None = None
    items = iter(argv)
    for item in items:
        if item == option:
            value = next(items, None)
            if value is None:
                raise UserError(f"{option} needs a value.")
        elif item.startswith(option + "="):
            value = item.split("=", 1)[1]
        else:
            rest.append(item)
    return value, rest


def _nearest(word: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Known {what}: {', '.join(known)}."


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested plain data, as YAML and checkpoints hold it, without tasks on offer that none chose."""
    values: dict[str, Any] = plain(dataclasses.asdict(config))
    tasks = getattr(config, "tasks", None)
    for f in () if tasks is None else dataclasses.fields(tasks):
        if f.metadata.get("offered") and getattr(tasks, f.name) == type(getattr(tasks, f.name))():
            del values["tasks"][f.name]
    return values


def build_parser(recipe: Recipe[C], command: str, variant: str, config: C | None = None) -> ArgumentParser:
    """The parser of one command; defaults are the values of `config`, or of the variant."""
    config = recipe.variants[variant] if config is None else config
    commands = "\n".join(f"  {name:<10} {c.help}" for name, c in recipe.commands.items())
    variants = "\n".join(f"  {name:<10} {recipe.notes[name]}" for name in recipe.variants)
    parser = ArgumentParser(
        prog=f"python -m moekit.recipes.{recipe.name} {command}",
        usage=f"python -m moekit.recipes.{recipe.name} [command] [--variant NAME] [--config FILE] [--key value ...]",
        description=f"{recipe.about}\n\ncommands:\n{commands}\n\nvariants:\n{variants}\n\n"
        "Any value below can be set on the command line, or in a YAML file given with --config.",
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,  # an abbreviation that works today is a typo tomorrow
    )
    parser.formatter_class = _Help
    parser.add_argument("--variant", default=variant, choices=list(recipe.variants), help="settings to start from")
    # A run's config.yaml names its recipe; given with --config it must be of this one.
    parser.add_argument("--recipe", default=recipe.name, choices=[recipe.name], help=SUPPRESS)
    parser.add_argument("--config", action="config", help="YAML file with settings; later options win over it")
    recipe.commands[command].options(parser)
    parser.add_class_arguments(type(config), as_group=False)
    parser.set_defaults(as_plain(config))
    return parser


def _keys(parser: ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _explain(error: str, parser: ArgumentParser) -> str:
    """A parser's complaint in words that say what to do."""
    known = _keys(parser)
    if match := re.search(r"unrecognized arguments: (\S+)", error, re.IGNORECASE):
        word = match.group(1)
        if not word.startswith("-"):
            return f"unexpected argument {word!r}. Options begin with --; see --help."
        return f"unknown option {word.split('=')[0]}.{_nearest(word.split('=')[0], known, 'options')}"
    if match := re.search(r"Group '([^']*)' does not accept option '([^']*)'", error):
        group, word = match.groups()
        key = f"--{group}.{word}"
        return f"unknown key {group}.{word} in the configuration.{_nearest(key, known, 'keys').replace('--', '')}"
    if match := re.search(r"[Oo]ption '([^']*)' is not accepted|Key '([^']*)' is not expected", error):
        word = next(g for g in match.groups() if g)
        return f"unknown key {word} in the configuration.{_nearest('--' + word, known, 'keys').replace('--', '')}"
    if match := re.search(r'Parser key "([^"]*)":\s*(.*)', error, re.DOTALL):
        key, problem = match.groups()
        problem = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", " ".join(problem.split()))
        problem = re.sub(r"<class '(\w+)'>", r"\1", problem)
        problem = problem.replace("Expected a one of", "Expected one of").replace("Expected a int.", "Expected an int.")
        problem = problem.replace("Expected a tuple.", "Expected a list in brackets, such as [1,2].")
        return f"{key}: {problem}"
    return " ".join(error.split())


def main(recipe: Recipe[Any], argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one message and exit code 2."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return _main(recipe, list(sys.argv[1:] if argv is None else argv)) or 0
    except (UserError, ArgumentError) as error:
        console.print(f"[bold red]error:[/] {_escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _main(recipe: Recipe[Any], argv: list[str]) -> int | None:
    command = next(iter(recipe.commands))
    if argv and not argv[0].startswith("-"):
        command, *argv = argv
        if command not in recipe.commands:
            raise UserError(f"unknown command {command!r}.{_nearest(command, list(recipe.commands), 'commands')}")
    wanted, argv = take(argv, "--variant")
    variant = wanted or next(iter(recipe.variants))
    if variant not in recipe.variants:
        raise UserError(f"unknown variant {variant!r}.{_nearest(variant, list(recipe.variants), 'variants')}")
    found = recipe.commands[command].defaults(recipe, argv, wanted)
    if found is not None:
        variant = found[0] if found[0] in recipe.variants else variant
    parser = build_parser(recipe, command, variant, None if found is None else found[1])
    argv = [_spelled_out(argument) for argument in argv]
    try:
        parsed = parser.parse_args(argv)
    except ArgumentError as error:
        named, _ = take(argv, "--config")
        where = f"{named}: " if named and "config" in str(error) else ""
        raise UserError(where + _explain(str(error), parser)) from None
    config = _build(type(recipe.variants[variant]), parsed)
    check_ranges(config)
    return recipe.commands[command].run(config, parsed)


def reconfigured(recipe: Recipe[C], config: C, arguments: Sequence[str]) -> C:
    """A configuration with options such as ``--model.dim=64`` applied.

    Raises:
        UserError: an unknown key (with the nearest one), or a value that does not fit.
    """
    parser = build_parser(recipe, next(iter(recipe.commands)), next(iter(recipe.variants)))
    parser.set_defaults(as_plain(config))
    try:
        changed = _build(type(config), parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser)) from None
    check_ranges(changed)
    return changed


def _build(cls: type[C], values: Any) -> C:
    """The dataclass `cls` from parsed values, nested dataclasses and mappings of them included."""
    hints = typing.get_type_hints(cls)
    known = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if f.name in values or not has_default:  # a run of an older version lacks the settings that came later
            known[f.name] = _coerce(hints[f.name], values[f.name])
    return cls(**known)


def _coerce(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _build(hint, value)
    if getattr(hint, "__origin__", None) is tuple and isinstance(value, (list, tuple)):
        return tuple(value)
    return value


def from_plain(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """The configuration `cls` from the plain data of a run folder or a checkpoint.

    Raises:
        UserError: a key is missing or does not fit; `where` begins the message.
    """
    try:
        return _build(cls, values)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: not a configuration of this recipe ({error}).") from None
