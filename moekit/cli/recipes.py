"""The command line of a recipe: its commands, variants and settings, YAML, and errors that help."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from moekit.cli import distill, finetune, fit, generate, plan, routing, run, score, serve, test
from moekit.cli.command import RecipeCommand, execute, option_value, option_values, overview
from moekit.cli.mistakes import NOT_PARSED, OtherCommandsOption, explain, require_settings
from moekit.errors import UserError, nearest
from moekit.output import lasting_output
from moekit.runs.plain import as_plain, with_setting
from moekit.runs.settings.fields import check_ranges
from moekit.shell import command_line, program

if TYPE_CHECKING:
    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe

COMMANDS: Mapping[str, RecipeCommand] = {
    "run": run.COMMAND,
    "fit": fit.COMMAND,
    "test": test.COMMAND,
    "generate": generate.COMMAND,
    "serve": serve.COMMAND,
    "score": score.COMMAND,
    "routing": routing.COMMAND,
    "finetune": finetune.COMMAND,
    "distill": distill.COMMAND,
    "plan": plan.COMMAND,
}
"""By name; the first is the default."""

_SHORT = {"--devices": "--train.devices", "--nodes": "--train.num_nodes"}
"""Options that have a short name, as in ``torchrun``."""


class Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """jsonargparse's help with the description's own line breaks."""

    def format_help(self) -> str:
        """The help, without the backspaces by which jsonargparse joins an option and its value on a terminal."""
        return super().format_help().replace(" \b", "")


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Run the command line of a recipe; returns the exit code: 0, or 2 where the input is at fault."""
    return execute(lambda: _main(recipe, list(sys.argv[1:] if argv is None else argv)))


def _main(recipe: Recipe, argv: list[str]) -> None:
    name = argv[0] if argv and not argv[0].startswith("-") else next(iter(COMMANDS))
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}. {nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    arguments = [_spelled_out(argument) for argument in argv[argv[:1] == [name] :]]
    wanted = option_value(arguments, "--variant")
    variant = wanted or next(iter(recipe.variants))
    if variant not in recipe.variants:
        raise UserError(f"unknown variant {variant!r}. {nearest(variant, recipe.variants)}")
    started = None if command.start is None else command.start(recipe, arguments, wanted)
    found, base = started or (variant, recipe.variants[variant].config)
    variant = found if found in recipe.variants else variant
    parser = build_parser(recipe, name, variant, base)
    given, config = _parsed(parser, recipe, base, arguments, command.settings)
    given.variant, given.arguments = given.get("variant") or variant, argv
    given.chose = lambda key: key in parser.parse_args(arguments, defaults=False)
    with lasting_output() if command.lasting else nullcontext():
        command.run(recipe, config, given)


def _spelled_out(argument: str) -> str:
    """The argument with its option's full name."""
    option, equals, value = argument.partition("=")
    return _SHORT.get(option, option) + equals + value


def build_parser(recipe: Recipe, command: str, variant: str, config: RunConfig | None = None) -> ArgumentParser:
    """The parser of one command; defaults are the values of `config`, or of the variant."""
    config = recipe.variants[variant].config if config is None else config
    chosen = COMMANDS[command]
    parser = ArgumentParser(
        prog=command_line(command, recipe.name),
        usage=f"{program()} COMMAND {recipe.name} [--variant NAME] [--key value ...]",
        description=f"{recipe.about}\n\ncommands:\n{overview({name: c.help for name, c in COMMANDS.items()})}\n\n"
        f"variants:\n{overview({name: v.note for name, v in recipe.variants.items()})}\n\n{command}: {chosen.help}.",
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,  # an abbreviation that works now would be a typo after the next new option
    )
    parser.formatter_class = Help
    parser.add_argument("--variant", default=variant, choices=list(recipe.variants), help="named preset of settings")
    if chosen.settings is None:
        # A run's config.yaml names its recipe; given with --config it must be of this one.
        parser.add_argument("--recipe", default=recipe.name, choices=[recipe.name], help=SUPPRESS)
        for key in recipe.renamed:
            parser.add_argument(f"--{key}", type=Any, default=None, help=SUPPRESS)
        parser.add_argument("--config", action="config", help="YAML file with settings; options after it override it")
    chosen.options(parser)
    values = as_plain(config)
    for group in fields(config):
        kind = type(getattr(config, group.name))
        keys = {f"{group.name}.{f.name}": f.name for f in fields(kind)}
        used = {key: name for key, name in keys.items() if chosen.settings is None or key in chosen.settings}
        if used:
            parser.add_class_arguments(kind, group.name, skip=set(keys.values()) - set(used.values()))
            stored = values[group.name]  # without the tasks on offer that none chose
            parser.set_defaults({key: stored[name] for key, name in used.items() if name in stored})
    return parser


def _tolerate_other_commands(parser: ArgumentParser) -> None:
    """Let files of settings hold the options of other commands, which ``--print_config`` writes beside the settings."""
    own = {action.dest for action in parser._actions}
    owners: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        if command.settings is None:
            other = ArgumentParser(exit_on_error=False)
            command.options(other)
            for option in {action.dest.partition(".")[0] for action in other._actions} - own:
                owners.setdefault(option, []).append(name)
    for option, names in owners.items():
        parser.add_argument(f"--{option}", action=OtherCommandsOption, const=names, help=SUPPRESS)


def _parsed(
    parser: ArgumentParser, recipe: Recipe, base: RunConfig, arguments: Sequence[str], settings: Sequence[str] | None
) -> tuple[Any, RunConfig]:
    """All options, and the settings with those of the options."""
    if settings is None and (files := option_values(arguments, "--config")):
        require_settings(parser, files)
        _tolerate_other_commands(parser)
    try:
        given = parser.parse_args(list(arguments))
    except UserError:
        raise
    except NOT_PARSED as error:
        _tolerate_other_commands(parser)  # to name whose option it is
        raise UserError(explain(str(error), parser, arguments)) from None
    if settings is None:
        for old, new in recipe.renamed.items():
            if given.get(old) is not None:
                given[new] = given[old]
        made = parser.instantiate(given)
        config = type(base)(**{group.name: made[group.name] for group in fields(base)})
    else:
        config = reduce(lambda config, key: with_setting(config, key, given[key]), settings, base)
    check_ranges(config)
    return given, config


def reconfigured(recipe: Recipe, config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """A configuration with options such as ``--model.dim=64`` applied.

    Raises:
        UserError: an unknown key (with the nearest one), or a value that does not fit.
    """
    changed = _with_settings(config, arguments)
    if changed is None:
        return reconfigured_by_all(recipe, config, arguments)
    check_ranges(changed)
    return changed


def reconfigured_by_all(recipe: Recipe, config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """The same by the parser of all settings, which takes thirty times as long, and knows what a mistake is."""
    parser = build_parser(recipe, next(iter(COMMANDS)), next(iter(recipe.variants)), config)
    return _parsed(parser, recipe, config, arguments, None)[1]


def _with_settings(config: RunConfig, arguments: Sequence[str]) -> RunConfig | None:
    """With ``--key=value`` applied; None where a key is no single setting, or a value does not fit."""
    parser = ArgumentParser(exit_on_error=False, default_env=False, allow_abbrev=False)
    keys = list(dict.fromkeys(argument.partition("=")[0].removeprefix("--") for argument in arguments))
    for key in keys:
        *path, name = key.split(".")
        group: Any = config
        for part in path:
            group = getattr(group, part, None)
        hint = get_type_hints(type(group)).get(name) if is_dataclass(group) else None
        if hint is None or is_dataclass(hint):
            return None
        parser.add_argument(f"--{key}", type=hint)
    try:
        given = parser.parse_args(list(arguments))
        return reduce(lambda made, key: with_setting(made, key, given[key]), keys, config)
    except (*NOT_PARSED, UserError):
        return None
