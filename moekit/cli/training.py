"""The commands that train: run, fit, finetune and distill; and plan, which says what training would need."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from moekit.cli.command import RecipeCommand, option_value
from moekit.report import terminal_summary, write_report
from moekit.runs.config import RunConfig
from moekit.runs.distill import Distillation
from moekit.runs.evaluate import evaluate
from moekit.runs.finetune import FineTuning
from moekit.runs.fit import fit, is_first_process
from moekit.runs.init_from import InitFrom
from moekit.runs.plan import forecast
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run

FOLDER = "folder of the run (default: runs/RECIPE-VARIANT)"


def folder(recipe: Recipe, variant: str, out: str | None, command: str = "") -> Path:
    """The folder of a run, which a command that starts from another run has its name in."""
    return Path(out or f"runs/{recipe.name}-{variant}{command and '-'}{command}")


def test_and_report(run: Run, config: RunConfig) -> None:
    """Test a run and write its report; of several processes the first writes."""
    if evaluate(run, config):
        write_report(run.path)
        terminal_summary(run.path, Console())


def _options(parser: ArgumentParser, out: str = FOLDER) -> None:
    parser.add_argument("--out", type=str, help=out)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run in --out")


def _train(recipe: Recipe, config: RunConfig, given: Any, start: type[InitFrom] | None = None) -> tuple[Run, RunConfig]:
    """Train into the folder of the options; the run, and the settings as they are on this machine."""
    own = Run(folder(recipe, given.variant, given.out, start.command if start else ""))
    resumed = given.resume and not given.overwrite and own.in_folder
    config = config.settled(own.settings if resumed else None)
    again = own if given.resume and own.last_checkpoint is not None else None
    init_from = start(given[start.option], start.choices(**vars(given[start.group])), config, again) if start else None
    arguments = [argument for argument in given.arguments if argument not in ("--resume", "--overwrite")]
    run = fit(
        recipe,
        given.variant,
        config,
        own.path,
        resume=given.resume,
        overwrite=given.overwrite,
        init_from=init_from,
        resume_command=shlex.join(["python", "-m", f"moekit.recipes.{recipe.name}", *arguments, "--resume"]),
        console=Console(),
    )
    return run, config


def _run(recipe: Recipe, config: RunConfig, given: Any) -> None:
    test_and_report(*_train(recipe, config, given))


def _fit(recipe: Recipe, config: RunConfig, given: Any) -> None:
    run, _ = _train(recipe, config, given)
    if is_first_process():
        Console().print(f"trained; test it with: python -m moekit.recipes.{recipe.name} test --out {run.path}")


def _starting(help: str, start: type[InitFrom], whose: str, other: str) -> RecipeCommand:
    """A command that trains a run which starts from another one, then tests and reports.

    Args:
        help: what it does.
        start: what is taken from the other run.
        whose: run it makes.
        other: help of the option that names the other run.
    """

    def options(parser: ArgumentParser) -> None:
        _options(parser, f"folder of {whose} run (default: runs/RECIPE-VARIANT-{start.command})")
        parser.add_argument(f"--{start.option}", type=str, metavar="RUN", help=other)
        parser.add_class_arguments(start.choices, start.group)

    def run(recipe: Recipe, config: RunConfig, given: Any) -> None:
        test_and_report(*_train(recipe, config, given, start))

    def defaults(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
        source, out = option_value(arguments, f"--{start.option}"), option_value(arguments, "--out")
        found = None
        if source is not None and not (out and _resumed(out, arguments)):
            found = start.starting_config(recipe, Run.load(source), variant)
        path = out or (folder(recipe, found[0], None, start.command) if found else None)
        own = _resumed(path, arguments) if path else None
        return found if own is None else (own.variant, own.config)

    return RecipeCommand(help, options, run, start=defaults)


def _resumed(path: str | Path, arguments: Sequence[str]) -> Run | None:
    """The run in a folder, if it is there and goes on."""
    run = Run(Path(path))
    return run if "--resume" in arguments and run.in_folder else None


def _plan_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--memory", type=float, help="device memory in GiB; shows if the model fits and the fewest devices"
    )
    parser.add_argument("--sequences", type=int, default=8, help="number of sequences in a device's micro-batch")
    parser.add_argument("--length", type=int, help="tokens in a sequence (default: data.max_length)")


def _plan(recipe: Recipe, config: RunConfig, given: Any) -> None:
    sizes = {name: given[name] for name in ("memory", "sequences", "length")}
    forecast(recipe, given.variant, config, Console(), **sizes)


RUN = RecipeCommand("Train a model, test it on held-out text and write the report", _options, _run)
FIT = RecipeCommand("Train a model, without test and report", _options, _fit)
FINETUNE = _starting(
    "Fine-tune a trained run, wholly, partly or with adapters, then test and report",
    FineTuning,
    "the new",
    "folder or checkpoint of the run to start from. Its settings are the defaults, except for steps, schedule and "
    "learning rate, which suit a short fine-tuning",
)
DISTILL = _starting(
    "Train a smaller model on text and the predictions of a trained run, then test and report",
    Distillation,
    "the student's",
    "folder or checkpoint of a trained run of any recipe. Its settings are the student's defaults (of another recipe "
    "only data and tasks), so give what makes the student smaller, for example --model.num_experts 0 or fewer layers",
)
PLAN = RecipeCommand("Estimate memory, FLOPs and communication without running the model", _plan_options, _plan)
