"""The command finetune of a folder of transformers: ``finetune --model FOLDER``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from moekit.cli.command import execute, location, option_value, say
from moekit.cli.mistakes import NOT_PARSED, explain
from moekit.cli.recipes import Help
from moekit.errors import UserError
from moekit.output import lasting_output
from moekit.runs.plain import as_plain
from moekit.runs.settings.fields import check_ranges
from moekit.shell import command_line
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from moekit.folders.settings import FolderConfig

_SHORT = {"--devices": "--train.devices", "--nodes": "--train.num_nodes"}


@dataclass(frozen=True)
class FolderCommand:
    """A command on folders of transformers.

    Attributes:
        help: one line, a sentence without its period.
        run: does it with the settings, all options, and the arguments that they are from.
    """

    help: str
    run: Callable[[FolderConfig, Any, Sequence[str]], None]


def main(command: FolderCommand, arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code: 0, or 2 where the input is at fault."""
    return execute(lambda: _main(command, [_spelled_out(argument) for argument in arguments]))


def _spelled_out(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return _SHORT.get(option, option) + equals + value


def _main(command: FolderCommand, arguments: list[str]) -> None:
    from moekit.folders.settings import ADAPTER_RATE, FolderConfig  # a help text of others needs none of it
    from moekit.folders.tuned import TunedFolder

    base = FolderConfig(model="")
    if option_value(arguments, "--fine_tune.rank") not in (None, "0"):
        base = base.with_train(learning_rate=ADAPTER_RATE)
    parser = build_parser(base)
    try:
        given = parser.parse_args(arguments)
    except UserError:
        raise
    except NOT_PARSED as error:
        raise UserError(explain(str(error), parser, arguments)) from None
    for name, what in (("model", "a folder of transformers"), ("out", "a folder to write")):
        if given[name] is None:
            raise UserError(f"finetune --model needs --{name}, {what}: got none. Give --{name} FOLDER.")
    made = parser.instantiate(given)
    groups = {f.name: made[f.name] for f in dataclasses.fields(base) if f.name != "model"}
    config = FolderConfig(model=given.model, **groups)
    check_ranges(config)
    if "train.warmup_steps" not in parser.parse_args(arguments, defaults=False):
        kept = TunedFolder(given.out).settings if given.resume else None
        config = config.with_train(warmup_steps=config.train.fitting_warmup(kept))
    with lasting_output():
        command.run(config, given, arguments)


def build_parser(base: FolderConfig) -> ArgumentParser:
    """The parser, whose defaults are the values of `base`."""
    from moekit.folders.settings import UNUSED

    parser = ArgumentParser(
        prog=command_line("finetune"),
        usage=f"{command_line('finetune', '--model')} FOLDER --data.path FILE --out FOLDER [--key value ...]",
        description=f"{COMMAND.help}.",
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    parser.formatter_class = Help
    # Not required by the parser, which is asked for single values when it explains what is wrong.
    parser.add_argument("--model", type=location, help="folder of transformers, with its tokenizer; required")
    parser.add_argument("--out", type=location, help="folder for settings, metrics and what is trained; required")
    parser.add_argument("--resume", action="store_true", help="continue in --out from the last checkpoint, if any")
    parser.add_argument("--overwrite", action="store_true", help="replace a former fine-tuning in --out")
    parser.add_argument(
        "--merge", action="store_true", help="also write a folder with the merged weights, where adapters train"
    )
    parser.add_argument("--config", action="config", help="YAML file with settings; options after it override it")
    values = as_plain(base)
    for group in dataclasses.fields(base):
        if group.name == "model":
            continue
        kind = type(getattr(base, group.name))
        names = {f.name for f in dataclasses.fields(kind)}
        skip = names & set(UNUSED) if group.name == "train" else set()
        parser.add_class_arguments(kind, group.name, skip=skip)
        parser.set_defaults({f"{group.name}.{name}": values[group.name][name] for name in sorted(names - skip)})
    return parser


def _run(config: FolderConfig, given: Any, arguments: Sequence[str]) -> None:
    from moekit.folders import finetune_folder
    from moekit.report import write_report
    from moekit.training.processes import is_first_process

    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    found = finetune_folder(
        config, given.out, resume=given.resume, overwrite=given.overwrite, merge=given.merge,
        resume_command=command_line("finetune", *kept, "--resume"), console=Terminal(),
    )  # fmt: skip
    if is_first_process():
        say(
            Terminal(),
            f"held-out loss {found.before:.4f} before, {found.after:.4f} after\n"
            + "\n".join(f"written  {folder}" for folder in found.exported)
            + f"\nreport   {write_report(found.path)}",
        )


COMMAND = FolderCommand("Fine-tune a folder of transformers with experts, wholly, partly or with adapters", _run)
