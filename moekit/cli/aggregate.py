"""The command aggregate."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, path
from moekit.cli.surgery import RUN, output_options, plain_option, seed_option, write
from moekit.errors import UserError


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--shared",
        default="mean",
        help="weights outside the experts: the mean of all runs (default), or those of one run, by its number (1, 2, "
        "...). The mean makes sense for runs with a common ancestor or the same initial weights (train.seed)",
    )
    parser.add_argument(
        "--gates",
        choices=["concatenate", "fresh"],
        default="concatenate",
        help="router weights: concatenate those of all runs (default), or initialise them afresh",
    )
    seed_option(parser, "fresh router weights")
    plain_option(parser, "the plain form of the paper, where one softmax over all experts shrinks their weights")
    output_options(parser)


def _aggregate(given: Namespace, console: Console) -> None:
    from moekit.runs.run import Run  # where it is used: a help text needs none of it
    from moekit.runs.surgery.operations import aggregate_runs
    from moekit.runs.surgery.writing import require_free

    require_free(given.out, overwrite=given.overwrite)
    count = len(given.runs)
    if count < 2:
        raise UserError("aggregate needs two or more runs: got one.")
    if given.shared != "mean" and given.shared not in [str(n + 1) for n in range(count)]:
        raise UserError(f"--shared must be mean or the number of a run, 1 to {count}: got {given.shared}.")
    result = aggregate_runs(
        [Run.load(run, given.config) for run in given.runs],
        shared_from=None if given.shared == "mean" else int(given.shared) - 1,
        fresh_gates=given.gates == "fresh",
        compensated=not given.plain,
        seed=given.seed,
    )
    write(result, given, console)


COMMAND = Command(
    "Combine the experts of several runs into one model",
    _options,
    _aggregate,
    "  moekit aggregate runs/one runs/two --out runs/both\n"
    "  moekit aggregate runs/one runs/two --shared 1 --gates fresh --restart --out runs/both",
)
