"""The command line that every recipe shares: variants, YAML, and errors that help."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from rich.console import Console

from moekit.cli.commands import COMMANDS, take
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.plain import as_plain
from moekit.runs.recipe import Recipe
from moekit.runs.settings.data import DataConfig
from moekit.runs.settings.evaluate import EvaluateConfig
from moekit.runs.settings.fields import check_ranges
from moekit.runs.settings.strategy import StrategyConfig
from moekit.runs.settings.train import TrainConfig


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's help with the description's own line breaks."""


_SHORT = {"--devices": "--train.devices", "--nodes": "--train.num_nodes"}
"""Options that have a short name, as in ``torchrun``."""


def _spelled_out(argument: str) -> str:
    """The argument with its option's full name."""
    option, equals, value = argument.partition("=")
    return _SHORT.get(option, option) + equals + value


def _nearest(word: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Known {what}: {', '.join(known)}."


def build_parser(recipe: Recipe, command: str, variant: str, config: RunConfig | None = None) -> ArgumentParser:
    """The parser of one command; defaults are the values of `config`, or of the variant."""
    config = recipe.variants[variant].config if config is None else config
    commands = "\n".join(f"  {name:<10} {c.help}" for name, c in COMMANDS.items())
    variants = "\n".join(f"  {name:<10} {v.note}" for name, v in recipe.variants.items())
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
    for key in recipe.renamed:
        parser.add_argument(f"--{key}", type=Any, default=None, help=SUPPRESS)
    parser.add_argument("--config", action="config", help="YAML file with settings; later options win over it")
    COMMANDS[command].options(parser)
    groups = {"data": DataConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "strategy": StrategyConfig}
    for name, kind in (groups | {"model": type(config.model), "tasks": type(config.tasks)}).items():
        parser.add_class_arguments(kind, name)
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


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
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


def _main(recipe: Recipe, argv: list[str]) -> int | None:
    command = next(iter(COMMANDS))
    if argv and not argv[0].startswith("-"):
        command, *argv = argv
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}.{_nearest(command, list(COMMANDS), 'commands')}")
    wanted, argv = take(argv, "--variant")
    variant = wanted or next(iter(recipe.variants))
    if variant not in recipe.variants:
        raise UserError(f"unknown variant {variant!r}.{_nearest(variant, list(recipe.variants), 'variants')}")
    found = COMMANDS[command].defaults(recipe, argv, wanted)
    if found is not None:
        variant = found[0] if found[0] in recipe.variants else variant
    parser = build_parser(recipe, command, variant, None if found is None else found[1])
    try:
        parsed = parser.parse_args([_spelled_out(argument) for argument in argv])
    except ArgumentError as error:
        named, _ = take(argv, "--config")
        where = f"{named}: " if named and "config" in str(error) else ""
        raise UserError(where + _explain(str(error), parser)) from None
    config = recipe.config(recipe.current(parsed.as_dict()), "the command line")
    check_ranges(config)
    return COMMANDS[command].run(recipe, config, parsed)


def reconfigured(recipe: Recipe, config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """A configuration with options such as ``--model.dim=64`` applied.

    Raises:
        UserError: an unknown key (with the nearest one), or a value that does not fit.
    """
    parser = build_parser(recipe, next(iter(COMMANDS)), next(iter(recipe.variants)), config)
    try:
        parsed = parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser)) from None
    changed = recipe.config(recipe.current(parsed.as_dict()), "the options")
    check_ranges(changed)
    return changed
