"""What the commands of a recipe share: the folder of a run, training into it, the test and the report of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from moekit.cli.command import option_value
from moekit.errors import UserError
from moekit.report import terminal_summary, write_report
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import evaluate
from moekit.runs.fit import fit
from moekit.runs.init_from import InitFrom
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run

_FOLDER = "folder of the run (default: runs/RECIPE-VARIANT)"


def run_options(parser: ArgumentParser, folder: str = _FOLDER) -> None:
    """The options of commands that make a run."""
    parser.add_argument("--out", type=str, default=None, help=folder)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in --out")


def folder_options(parser: ArgumentParser) -> None:
    """The options of commands that use a run."""
    parser.add_argument("--out", type=str, default=None, help=_FOLDER)


def folder(recipe: Recipe, variant: str, out: str | None, command: str = "") -> Path:
    """The folder of a run, which a command that starts from another run has its name in."""
    return Path(out or f"runs/{recipe.name}-{variant}{command and '-'}{command}")


def train(
    recipe: Recipe, config: RunConfig, given: Any, command: str = "", start: Callable[..., InitFrom] | None = None
) -> tuple[Run, RunConfig]:
    """Train into the folder of the options; the run, and the settings as they are on this machine.

    Args:
        recipe: whose model is trained.
        config: the settings.
        given: all options.
        command: the command's name, where the run starts from another.
        start: makes what is taken from another run, from the settings, and the own run where that is resumed.
    """
    own = Run(folder(recipe, given.variant, given.out, command))
    resumed = given.resume and not given.overwrite and own.in_folder
    config = config.settled(own.settings if resumed else None)
    again = own if given.resume and own.last_checkpoint is not None else None
    arguments = [argument for argument in given.arguments if argument not in ("--resume", "--overwrite")]
    run = fit(
        recipe,
        given.variant,
        config,
        own.path,
        resume=given.resume,
        overwrite=given.overwrite,
        init_from=None if start is None else start(config, again),
        resume_command=shlex.join(["python", "-m", f"moekit.recipes.{recipe.name}", *arguments, "--resume"]),
        console=Console(),
    )
    return run, config


def test_and_report(run: Run, config: RunConfig) -> None:
    """Test a run and write its report; of several processes the first writes."""
    if evaluate(run, config):
        write_report(run.path)
        terminal_summary(run.path, Console())


def stored_run(recipe: Recipe, given: Any) -> Run:
    """The run of this recipe in the folder of the options.

    Raises:
        UserError: there is none, or one of another recipe.
    """
    return _own(recipe, Run.open(folder(recipe, given.variant, given.out)))


def _own(recipe: Recipe, run: Run) -> Run:
    if (name := run.settings.get("recipe")) != recipe.name:
        raise UserError(f"{run.path} must hold a run of {recipe.name}: it is of {name}.")
    return run


def stored_settings(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
    """Variant and settings of the run that a command uses, on one device of this machine; None where there is none."""
    run = Run(folder(recipe, variant or next(iter(recipe.variants)), option_value(arguments, "--out")))
    if not run.in_folder:
        return None
    config = _own(recipe, run).config
    return variant or run.variant, config.changed(train=config.train.elsewhere())


def settings_of_other(
    option: str, command: str, starting: Callable[[Recipe, Run, str | None], tuple[str, RunConfig]]
) -> Callable[[Recipe, Sequence[str], str | None], tuple[str, RunConfig] | None]:
    """Makes `RecipeCommand.start` of a command that starts from another run.

    Args:
        option: names the other run.
        command: the command's name.
        starting: variant and settings from the other run.
    """

    def start(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
        other, out = option_value(arguments, option), option_value(arguments, "--out")
        found = (
            None if other is None or (out and _resumed(out, arguments)) else starting(recipe, Run.load(other), variant)
        )
        path = out or (folder(recipe, found[0], None, command) if found else None)
        own = _resumed(path, arguments) if path else None
        return found if own is None else (own.variant, own.config)

    return start


def _resumed(path: str | Path, arguments: Sequence[str]) -> Run | None:
    """The run in a folder, if it is there and goes on."""
    run = Run(Path(path))
    return run if "--resume" in arguments and run.in_folder else None
