"""What the commands of a recipe do, and the options that they take beside its settings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from moekit.errors import UserError
from moekit.report import terminal_summary, write_report
from moekit.runs import distill, finetune
from moekit.runs.config import RunConfig
from moekit.runs.evaluate import evaluate
from moekit.runs.fit import fit, is_first_process
from moekit.runs.generate import generate
from moekit.runs.init_from import InitFrom
from moekit.runs.plan import forecast
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run
from moekit.runs.score import score
from moekit.runs.text import corpus_note

Defaults = tuple[str, RunConfig] | None
"""Variant and settings that are the defaults of a command; None = the variant's own."""


@dataclass(frozen=True)
class Command:
    """One thing that every recipe can do.

    Attributes:
        help: its line in the help.
        run: does it, with the recipe, the settings and all options, and returns the exit code.
        options: adds its own options.
        defaults: from recipe, arguments and wanted variant, where its settings begin.
    """

    help: str
    run: Callable[[Recipe, RunConfig, Namespace], int]
    options: Callable[[ArgumentParser], None]
    defaults: Callable[[Recipe, Sequence[str], str | None], Defaults] = lambda *given: None


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


# -- options -------------------------------------------------------------------------------------------------------


def _run_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="folder of the run (default: runs/RECIPE-VARIANT, and -finetune or -distill behind it)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in that folder")


def _folder_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default=None, help="folder of the run (default: runs/RECIPE-VARIANT)")


def _generate_options(parser: ArgumentParser) -> None:
    _folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language of the input")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="language wanted, of runs that translate"
    )
    parser.add_argument(
        "--input", type=str, default="-", help="file with one sentence or prompt per line; - = standard input"
    )
    parser.add_argument("--output", type=str, default="-", help="file for what is written; - = standard output")
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="at most so many experts of each layer in memory, the others mapped from disk as tokens ask for them; "
        "0 = all",
    )


def _score_options(parser: ArgumentParser) -> None:
    _folder_options(parser)
    parser.add_argument("--from", type=str, default=None, dest="source_language", help="language of the contexts")
    parser.add_argument(
        "--to", type=str, default=None, dest="target_language", help="language of the continuations (default: --from)"
    )
    parser.add_argument(
        "--input",
        type=str,
        default="-",
        help='JSON lines {"context": text, "continuations": [text, ...], "answer": number from 0, or left out}; '
        "- = standard input",
    )
    parser.add_argument(
        "--examples", type=str, default=None, help="JSON lines with answers, shown before every context: few-shot"
    )
    parser.add_argument("--output", type=str, default="-", help="file for JSON lines of scores; - = standard output")


def _finetune_options(parser: ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--init_from",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of the run to start from; all settings begin as that run has them, but for steps, "
        "schedule and learning rate",
    )
    parser.add_class_arguments(finetune.FineTuneConfig, "fine_tune")


def _distill_options(parser: ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument(
        "--teacher",
        type=str,
        default=None,
        metavar="RUN",
        help="folder or checkpoint of a trained run, of any recipe; the student's settings begin as that run has them "
        "(of another recipe: its data and tasks), so say what is smaller, for example --model.num_experts 0 or fewer "
        "layers",
    )
    parser.add_class_arguments(distill.DistillConfig, "distill")


def _plan_options(parser: ArgumentParser) -> None:
    parser.add_argument("--memory", type=float, default=None, help="GiB of a device: say whether it fits, and where")
    parser.add_argument("--sequences", type=int, default=8, help="in a micro-batch of a device")
    parser.add_argument("--length", type=int, default=None, help="tokens of a sequence (default: data.max_length)")


# -- what they do --------------------------------------------------------------------------------------------------


def _run(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    config, run = _fit_to(recipe, config, given, _folder(recipe, given))
    _evaluate(run, config)
    return 0


def _fit(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    _, run = _fit_to(recipe, config, given, _folder(recipe, given))
    if is_first_process():
        Console().print(f"trained; test it with: python -m moekit.recipes.{recipe.name} test --out {run.path}")
    return 0


def _test(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    """With the configuration that the folder holds, on the devices that are asked for."""
    run = _opened(recipe, given)
    if is_first_process() and (note := corpus_note(run)):
        Console().print(f"{run.path}: {note}", highlight=False, soft_wrap=True, markup=False)
    _evaluate(run, run.config.changed(train=run.config.train.elsewhere(config.train)))
    return 0


def _generate(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    generate(
        _opened(recipe, given),
        given.source_language,
        given.target_language,
        input=given.input,
        output=given.output,
        experts_in_memory=given.experts_in_memory,
    )
    return 0


def _score(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    score(
        _opened(recipe, given),
        given.source_language,
        given.target_language,
        input=given.input,
        examples=given.examples,
        output=given.output,
    )
    return 0


def _finetune(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    chosen = finetune.FineTuneConfig(**vars(given.fine_tune))

    def begin(settled: RunConfig, own: Run | None) -> InitFrom:
        return finetune.FineTuning(given.init_from, chosen, settled, own)

    return _start(recipe, config, given, "finetune", begin)


def _distill(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    chosen = distill.DistillConfig(**vars(given.distill))
    return _start(recipe, config, given, "distill", lambda _, own: distill.Distillation(given.teacher, chosen, own))


def _start(
    recipe: Recipe,
    config: RunConfig,
    given: Namespace,
    command: str,
    begin: Callable[[RunConfig, Run | None], InitFrom],
) -> int:
    """Train from another run, test, report."""
    out = Path(given.out or _default_out(recipe, given.variant, command))
    own = Run(out) if given.resume and Run(out).last_checkpoint is not None else None
    config, run = _fit_to(recipe, config, given, out, lambda settled: begin(settled, own))
    _evaluate(run, config)
    return 0


def _plan(recipe: Recipe, config: RunConfig, given: Namespace) -> int:
    forecast(
        recipe, given.variant, config, Console(), memory=given.memory, sequences=given.sequences, length=given.length
    )
    return 0


# -- what they share -----------------------------------------------------------------------------------------------


def _fit_to(
    recipe: Recipe, config: RunConfig, given: Namespace, out: Path, begin: Callable[[RunConfig], InitFrom] | None = None
) -> tuple[RunConfig, Run]:
    """Train into a folder; the settings with which that was done, and the run."""
    going_on = given.resume and not given.overwrite and Run(out).in_folder
    config = config.settled(Run(out).settings if going_on else None)
    run = fit(
        recipe,
        given.variant,
        config,
        out,
        resume=given.resume,
        overwrite=given.overwrite,
        init_from=None if begin is None else begin(config),
        resume_command=_resume_command(recipe),
        console=Console(),
    )
    return config, run


def _evaluate(run: Run, config: RunConfig) -> None:
    """Test, and write the report."""
    if evaluate(run, config):
        write_report(run.path)
        terminal_summary(run.path, Console())


def _folder(recipe: Recipe, given: Namespace) -> Path:
    return Path(given.out or f"runs/{recipe.name}-{given.variant}")


def _opened(recipe: Recipe, given: Namespace) -> Run:
    """The run of this recipe in the folder that is asked for."""
    run = Run.open(_folder(recipe, given))
    name = run.settings.get("recipe")
    if name != recipe.name:
        raise UserError(f"{run.path} must hold a run of {recipe.name}: it is of {name}.")
    return run


def _resume_command(recipe: Recipe) -> str:
    """The command that was given, with --resume."""
    given = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
    return shlex.join(["python", "-m", f"moekit.recipes.{recipe.name}", *given, "--resume"])


def _default_out(recipe: Recipe, variant: str, command: str) -> Path:
    """Where a run is written that starts from another and was not told where."""
    return Path(f"runs/{recipe.name}-{variant}-{command}")


def _defaults_from_run(
    recipe: Recipe,
    argv: Sequence[str],
    variant: str | None,
    *,
    option: str,
    command: str,
    starting: Callable[[Recipe, Run, str | None], tuple[str, RunConfig]],
) -> Defaults:
    """Variant and settings of the other run that a command takes, or of the own one where that is resumed."""

    def resumed(out: Path) -> Defaults:
        run = Run(out)
        return (run.variant, run.config) if "--resume" in argv and run.in_folder else None

    other, out = take(argv, option)[0], take(argv, "--out")[0]
    if out is not None and (found := resumed(Path(out))):
        return found
    if other is None:
        return None
    name, config = starting(recipe, Run.load(other), variant)
    return (None if out is not None else resumed(_default_out(recipe, name, command))) or (name, config)


COMMANDS: Mapping[str, Command] = {
    "run": Command("train, test on held-out text, and write the report (default)", _run, _run_options),
    "fit": Command("train only", _fit, _run_options),
    "test": Command("test a trained run and write its report again", _test, _folder_options),
    "generate": Command("translate text, or continue it, with a trained run", _generate, _generate_options),
    "score": Command("answer multiple-choice questions by the likeliest continuation", _score, _score_options),
    "finetune": Command(
        "start from a run: other data, some parameters, adapters; train, test, report",
        _finetune,
        _finetune_options,
        partial(_defaults_from_run, option="--init_from", command="finetune", starting=finetune.starting_config),
    ),
    "distill": Command(
        "train a smaller model on text and on what a run says of it; test, report",
        _distill,
        _distill_options,
        partial(_defaults_from_run, option="--teacher", command="distill", starting=distill.starting_config),
    ),
    "plan": Command("say what the model needs on a layout, without running it", _plan, _plan_options),
}
"""By name; the first is the default."""
