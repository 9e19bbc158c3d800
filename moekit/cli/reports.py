"""The commands that show what runs are: report, compare, inspect and curve."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.cli.command import Command, say
from moekit.cli.surgery import RUN, amount, config_option, part_options, run_option, seed_option
from moekit.errors import UserError
from moekit.report import results_markdown, terminal_summary, write_comparison, write_report
from moekit.report.pruning import write_curve
from moekit.runs.run import Run
from moekit.runs.surgery.curve import Recovery, pruning_curve, table
from moekit.runs.surgery.inspection import inspect, show


def _runs_options(parser: ArgumentParser, runs: str, page: str) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=runs)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"HTML file {page} (default: comparison.html); a markdown file is written beside it",
    )


def _compared(given: Namespace) -> None:
    """Write a page and a markdown file that compare the runs, and say where they are."""
    path = write_comparison(given.runs, given.out or Path("comparison.html"))
    print(f"{path}\n{path.with_suffix('.md')}")


def _report_options(parser: ArgumentParser) -> None:
    _runs_options(parser, "folder of a run (its --out)", "of a comparison")
    parser.add_argument("--markdown", action="store_true", help="print one report as markdown instead of writing HTML")


def _report(given: Namespace, console: Console) -> None:
    first, *others = given.runs
    if not others and given.out is not None:
        raise UserError("--out is for comparisons: the report of one run is always RUN/report.html.")
    if others and given.markdown:
        raise UserError("--markdown prints one run: a comparison writes its markdown beside the page.")
    if others:
        _compared(given)
    elif given.markdown:
        sys.stdout.write(results_markdown(first))
    else:
        write_report(first)
        terminal_summary(first, console)


REPORT = Command(
    "Write the report of a run, finished or not; compare several runs with the first",
    _report_options,
    _report,
    "  python -m moekit.report runs/tiny                       write runs/tiny/report.html, print the summary\n"
    "  python -m moekit.report runs/tiny runs/tiny_dense       compare: comparison.html and comparison.md\n"
    "  python -m moekit.report runs/tiny --markdown > tiny.md  numbers and samples, to commit",
)


def _compare(given: Namespace, console: Console) -> None:
    if len(given.runs) < 2:
        raise UserError("compare needs two or more runs: got one. For one run: python -m moekit report RUN.")
    _compared(given)


COMPARE = Command(
    "Compare several runs with the first one",
    lambda parser: _runs_options(parser, "two or more run folders, baseline first", "to write"),
    _compare,
    "  python -m moekit compare runs/tiny runs/tiny_dense --out results/comparison.html",
)


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help=f"{RUN}, or a state dict file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config_option(parser)


def _inspect(given: Namespace, console: Console) -> None:
    found = inspect(given.path, given.config)
    if given.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        show(found, console)


INSPECT = Command(
    "Show the sparse layers of a checkpoint: experts, sizes and utilisation",
    _inspect_options,
    _inspect,
    "  python -m moekit inspect runs/zcode_m3-tiny\n"
    "  python -m moekit inspect runs/zcode_m3-tiny/checkpoints/last.ckpt --json",
)


def _curve_options(parser: ArgumentParser) -> None:
    run_option(parser)
    parser.add_argument(
        "--keep",
        type=amount,
        nargs="+",
        default=[0.75, 0.5, 0.25],
        help="amounts of experts to keep in each layer, as numbers or shares (default: 75%% 50%% 25%%)",
    )
    parser.add_argument("--draws", type=int, default=20, help="random selections for each amount (default: 20)")
    seed_option(parser, "the first random selection")
    parser.add_argument(
        "--recover",
        type=int,
        default=0,
        metavar="STEPS",
        help="number of optimizer steps of further training of each pruned model (default: 0, no training)",
    )
    parser.add_argument(
        "--recover-rate",
        type=float,
        default=0.0,
        help="peak learning rate of the further training (default: a tenth of the run's)",
    )
    part_options(parser)
    config_option(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the results, pruning.*")


def _curve(given: Namespace, console: Console) -> None:
    if given.draws < 0 or given.recover < 0:
        raise UserError("--draws and --recover must not be negative.")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out must be a folder: {given.out} is a file.")
    run = Run.load(given.run, given.config)
    rate = given.recover_rate or run.config.train.learning_rate / 10
    bar = Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("validating", total=1 + len(given.keep) * (2 + given.draws))
        curve = pruning_curve(
            run,
            given.keep,
            draws=given.draws,
            recovery=Recovery(given.recover, rate) if given.recover else None,
            seed=given.seed,
            language=given.language,
            task=given.task,
            advance=lambda what: bar.update(task, advance=1, description=what),
        )
    write_curve(curve, given.out)
    say(console, table(curve))


CURVE = Command(
    "Measure quality against model size: prune in several ways and validate each model",
    _curve_options,
    _curve,
    "  python -m moekit curve runs/tiny --out results\n"
    "  python -m moekit curve runs/tiny --keep 50% --draws 3 --recover 300 --out results",
)
