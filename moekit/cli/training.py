"""What the commands that train share: options, the folder, what is resumed, and what they start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, location, option_value, say
from moekit.runs.smoke import smoke
from moekit.shell import recipe_command
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.init_from import InitFrom
    from moekit.runs.recipe import Recipe
    from moekit.runs.run import Run

FOLDER = "folder of the run (default: runs/RECIPE-VARIANT)"


def folder(recipe: Recipe, variant: str, out: str | None, command: str = "") -> Path:
    """The folder of a run, which a command that starts from another run has its name in."""
    return Path(out or f"runs/{recipe.name}-{variant}{command and '-'}{command}")


def test_and_report(run: Run, config: RunConfig) -> None:
    """Test a run and write its report; of several processes the first writes."""
    from moekit.report import terminal_summary, write_report  # where it is used: a help text draws nothing
    from moekit.runs.evaluate import evaluate

    if evaluate(run, config):
        write_report(run.path)
        terminal_summary(run.path, Terminal())


def smoke_option(parser: ArgumentParser) -> None:
    """Options of the commands that train a recipe from its beginning."""
    training_options(parser)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="smoke test: do everything in seconds, with a tiny model and a few steps, to see that it works with your "
        "data and machine; settings that you give count. The numbers are no results, and are labelled so",
    )


def smoke_settings(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
    """The settings of a smoke test, where one is asked for."""
    name = variant or next(iter(recipe.variants))
    return (name, smoke(recipe.variants[name].config)) if "--smoke" in arguments else None


def training_options(parser: ArgumentParser, out: str = FOLDER) -> None:
    """Where the run goes, and whether it goes on or begins again."""
    parser.add_argument("--out", type=location, help=out)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its last checkpoint; begin anew where there is none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in --out")


def train(recipe: Recipe, config: RunConfig, given: Any, start: type[InitFrom] | None = None) -> tuple[Run, RunConfig]:
    """Train into the folder of the options; the run, and the settings as they are on this machine."""
    from moekit.runs.fit import fit  # where it is used: a help text trains nothing
    from moekit.runs.run import Run
    from moekit.training.processes import is_first_process

    smoke_test = given.get("smoke", False)
    command = start.command if start else "smoke" if smoke_test else ""
    own = Run(folder(recipe, given.variant, given.out, command))
    resumed = given.resume and not given.overwrite and own.in_folder
    kept = own.settings if resumed else None
    config, notes = config.settled(kept), []
    if given.resume and own.last_checkpoint is None:
        notes.append(
            f"{own.path}: {'the run has no checkpoint yet' if resumed else 'no run is there'}; it begins anew."
        )
    warmup, was = config.train.fitting_warmup(kept), config.train.warmup_steps
    if warmup != was and not given.chose("train.warmup_steps"):
        why = "as the run began" if resumed else f"of the {config.train.max_steps} steps of training"
        notes.append(f"train.warmup_steps is {warmup} {why}, not {was}; give it to choose another.")
        config = config.changed(train={"warmup_steps": warmup})
    if notes and is_first_process():
        say(Terminal(), "\n".join(notes))
    again = own if given.resume and own.last_checkpoint is not None else None
    init_from = start(given[start.option], start.choices(**vars(given[start.group])), config, again) if start else None
    arguments = [argument for argument in given.arguments if argument not in ("--resume", "--overwrite")]
    run = fit(
        recipe, given.variant, config, own.path, resume=given.resume, overwrite=given.overwrite, init_from=init_from,
        smoke=smoke_test, resume_command=recipe_command(recipe.name, [*arguments, "--resume"]), console=Terminal(),
    )  # fmt: skip
    return run, config


def starting_command(help: str, start: Callable[[], type[InitFrom]], whose: str, other: str) -> RecipeCommand:
    """A command that trains a run which starts from another one, then tests and reports.

    Args:
        help: what it does.
        start: what is taken from the other run; called where it is needed, which a list of commands does not.
        whose: run it makes.
        other: help of the option that names the other run.
    """

    def options(parser: ArgumentParser) -> None:
        made = start()
        training_options(parser, f"folder of {whose} run (default: runs/RECIPE-VARIANT-{made.command})")
        parser.add_argument(f"--{made.option}", type=location, metavar="RUN", help=other)
        parser.add_class_arguments(made.choices, made.group)

    def run(recipe: Recipe, config: RunConfig, given: Any) -> None:
        test_and_report(*train(recipe, config, given, start()))

    def defaults(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
        from moekit.runs.run import Run

        made = start()
        source, out = option_value(arguments, f"--{made.option}"), option_value(arguments, "--out")
        found = None
        if source is not None and not (out and _resumed(out, arguments)):
            found = made.starting_config(recipe, Run.load(source), variant)
        path = out or (folder(recipe, found[0], None, made.command) if found else None)
        own = _resumed(path, arguments) if path else None
        return found if own is None else (own.variant, own.config)

    return RecipeCommand(help, options, run, start=defaults, lasting=True)


def _resumed(path: str | Path, arguments: Sequence[str]) -> Run | None:
    """The run in a folder, if it is there and goes on."""
    from moekit.runs.run import Run

    run = Run(Path(path))
    return run if "--resume" in arguments and run.in_folder else None
