"""The command upcycle."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, number
from moekit.cli.surgery import change, output_options, plain_option, run_option, seed_option


def _options(parser: ArgumentParser) -> None:
    run_option(parser, "; dense, or sparse to add more experts")
    parser.add_argument(
        "--experts", type=number(int, at_least=1), required=True, help="number of experts in each new sparse layer"
    )
    parser.add_argument(
        "--noise",
        type=number(float, at_least=0),
        default=0.0,
        help="noise added to the copies, in standard deviations of the weights (default: 0; 0.1 makes experts differ)",
    )
    parser.add_argument(
        "--scale",
        type=number(float),
        default=1.0,
        help="factor on the output of experts of a dense run (default: 1); the number of experts roughly keeps the "
        "function with a new top-1 softmax router",
    )
    seed_option(parser, "noise and new routers")
    plain_option(parser, "for a sparse run, where copies of an expert then share its routing weight")
    output_options(parser)


def _upcycle(given: Namespace, console: Console) -> None:
    from moekit.runs.surgery.operations import upcycle_run  # where it is used: a help text needs none of it

    options = {"noise": given.noise, "scale": given.scale, "compensated": not given.plain, "seed": given.seed}
    change(given, console, lambda run: upcycle_run(run, given.experts, **options))


COMMAND = Command(
    "Turn the feed-forward layers of a dense model into experts, or copy experts of a sparse one",
    _options,
    _upcycle,
    "  moekit upcycle runs/dense --experts 8 --noise 0.1 --scale 8 --restart --out runs/sparse",
)
