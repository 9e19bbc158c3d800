"""The command upcycle."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command
from moekit.cli.surgery import change, output_options, plain_option, run_option
from moekit.errors import UserError
from moekit.runs.surgery.operations import upcycle_run


def _options(parser: ArgumentParser) -> None:
    run_option(parser, "; dense, or sparse to get more experts")
    parser.add_argument("--experts", type=int, required=True, help="number of experts of each sparse layer")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="noise on the copies, in standard deviations of the weights (default: 0; 0.1 tells them apart)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on what experts write (default: 1); as many as experts keeps the function under a fresh top-1 "
        "softmax router",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and routers (default: 0)")
    plain_option(parser, "for a sparse run, whose copies share weights (default: what they lose is made up for)")
    output_options(parser)


def _upcycle(given: Namespace, console: Console) -> None:
    if given.noise < 0:
        raise UserError(f"--noise must not be negative: got {given.noise:g}.")
    options = {"noise": given.noise, "scale": given.scale, "compensated": not given.plain, "seed": given.seed}
    change(given, console, lambda run: upcycle_run(run, given.experts, **options))


COMMAND = Command(
    "Turn a dense model's feed-forwards into experts, or copy experts",
    _options,
    _upcycle,
    "  python -m moekit upcycle runs/dense --experts 8 --noise 0.1 --scale 8 --restart --out runs/sparse",
)
