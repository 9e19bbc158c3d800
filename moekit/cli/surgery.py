"""What the commands that make new runs of trained ones share: options, and the run that they write."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from moekit.cli.command import number, path, say
from moekit.shell import command_line

if TYPE_CHECKING:
    from moekit.runs.run import Run
    from moekit.runs.surgery.operations import Result

RUN = "folder of a run (its best checkpoint is used, else its last), or a checkpoint"


def run_option(parser: ArgumentParser, more: str = "") -> None:
    """The run that is changed."""
    parser.add_argument("run", type=path, metavar="RUN", help=RUN + more)


def config_option(parser: ArgumentParser) -> None:
    """What says of which model a checkpoint is."""
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="config.yaml of a run of the same model, for a checkpoint without its own configuration",
    )


def part_options(parser: ArgumentParser) -> None:
    """Whose utilisation counts."""
    for name, place in (("language", "for this language"), ("task", "in this task")):
        parser.add_argument(f"--{name}", help=f"measure expert utilisation only {place} (default: all validation text)")


def seed_option(parser: ArgumentParser, what: str) -> None:
    """The seed of what is drawn."""
    parser.add_argument(
        "--seed", type=number(int, at_least=0, at_most=2**32 - 1), default=0, help=f"random seed of {what} (default: 0)"
    )


def output_options(parser: ArgumentParser) -> None:
    """Where the new run goes, and how it goes on."""
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder of the new run or model")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="restart at step 0 when training continues (default: continue at the step and learning rate of the run)",
    )
    parser.add_argument("--fresh-optimizer", action="store_true", help="discard the state of the optimizer")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run or model in --out")
    config_option(parser)


def plain_option(parser: ArgumentParser, what: str) -> None:
    """Whether weights stay as they are."""
    parser.add_argument("--plain", action="store_true", help=f"do not rescale experts and model.k: {what}")


def amount(text: str) -> int | float:
    """``4``, ``0.5`` or ``50%``.

    Raises:
        ArgumentTypeError: anything else.
    """
    from moekit.surgery import parse_amount  # where it is used: a help text needs none of it

    try:
        return parse_amount(text)
    except ValueError:
        raise ArgumentTypeError(f"a number of experts (4), or a share of them (0.5 or 50%): got {text!r}") from None


def change(given: Namespace, console: Console, operation: Callable[[Run], Result]) -> None:
    """Write what the operation makes of the run of the options, unless something is in the way."""
    from moekit.runs.run import Run  # where it is used: a help text needs none of it
    from moekit.runs.surgery.writing import require_free

    require_free(given.out, overwrite=given.overwrite)
    write(operation(Run.load(given.run, given.config)), given, console)


def write(result: Result, given: Namespace, console: Console) -> None:
    """Write the new run, and say what can be done with it."""
    from moekit.runs.run import Run
    from moekit.runs.surgery.writing import write_run

    if given.fresh_optimizer:
        result = dataclasses.replace(result, slots=None)
    folder = write_run(result, given.out, restart=given.restart, overwrite=given.overwrite)
    layers = {layer.num_experts for layer in Run.load(folder.path).layers().values()}
    experts = f"{', '.join(str(n) for n in sorted(layers))} experts in a layer" if layers else "dense"
    count = sum(tensor.numel() for tensor in result.weights.values())
    minutes = " --train.max_minutes MINUTES" if result.config.train.max_minutes and not given.restart else ""
    fit = command_line("fit", result.run.recipe.name, "--config", folder.path / "config.yaml", "--out", folder.path)
    said = f"{result.said}\n" if result.said else ""
    say(
        console,
        f"{folder.path}: {count:,} parameters, {experts}\n{said}"
        f"test it      {command_line('test', folder.path)}\n"
        f"train it on  {fit} --resume --train.max_steps STEPS{minutes}",
    )
