"""The command curve."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.cli.command import Command, number, path, say
from moekit.cli.folders import FOLDER, of_folder, text_given, text_options
from moekit.cli.surgery import amount, config_option, part_options, run_option, seed_option
from moekit.errors import UserError
from moekit.terminal import Terminal


def _options(parser: ArgumentParser) -> None:
    run_option(parser, FOLDER)
    parser.add_argument(
        "--keep",
        type=amount,
        nargs="+",
        default=[0.75, 0.5, 0.25],
        help="amounts of experts to keep in each layer, as numbers or shares (default: 75%% 50%% 25%%)",
    )
    parser.add_argument(
        "--draws", type=number(int, at_least=0), default=20, help="random selections for each amount (default: 20)"
    )
    seed_option(parser, "the first random selection")
    parser.add_argument(
        "--recover",
        type=number(int, at_least=0),
        default=0,
        metavar="STEPS",
        help="number of optimizer steps of further training of each pruned model (default: 0, no training)",
    )
    parser.add_argument(
        "--recover-rate",
        type=number(float, at_least=0),
        default=0.0,
        help="peak learning rate of the further training (default: a tenth of the run's)",
    )
    part_options(parser)
    config_option(parser)
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder for the results, pruning.*")
    text_options(parser, "on which experts are chosen (training split) and judged (validation split)")


def _curve(given: Namespace, console: Console) -> None:
    from moekit.report.pruning import write_curve  # where it is used: a help text needs none of it
    from moekit.runs.folders.curve import folder_curve
    from moekit.runs.run import Run
    from moekit.runs.surgery.curve import Recovery, pruning_curve, table

    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out must be a folder: {given.out} is a file.")
    folder, text = of_folder(given), text_given(given)
    if folder and text is None:
        raise UserError("the curve of a transformers folder needs text: give --data.source and --data.path.")
    bar = Progress(
        TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Terminal(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("validating", total=1 + len(given.keep) * (2 + given.draws))

        def advance(what: str) -> None:
            bar.update(task, advance=1, description=what)

        if folder:
            assert text is not None
            curve = folder_curve(given.run, given.keep, text, draws=given.draws, seed=given.seed, advance=advance)
        else:
            run = Run.load(given.run, given.config)
            rate = given.recover_rate or run.config.train.learning_rate / 10
            curve = pruning_curve(
                run,
                given.keep,
                draws=given.draws,
                recovery=Recovery(given.recover, rate) if given.recover else None,
                seed=given.seed,
                language=given.language,
                task=given.task,
                advance=advance,
            )
    write_curve(curve, given.out)
    say(console, table(curve))


COMMAND = Command(
    "Measure quality against model size: prune in several ways and validate each model",
    _options,
    _curve,
    "  moekit curve runs/tiny --out results\n"
    "  moekit curve runs/tiny --keep 50% --draws 3 --recover 300 --out results\n"
    "  moekit curve OLMoE-1B-7B --data.path my-text --draws 5 --out results",
)
