"""The command upcycle."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, number
from moekit.cli.folders import FOLDER, of_folder, write_changed
from moekit.cli.surgery import change, output_options, plain_option, run_option, seed_option


def _options(parser: ArgumentParser) -> None:
    run_option(parser, f"; dense, or sparse to add more experts{FOLDER}, dense")
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
    parser.add_argument(
        "--k", type=number(int, at_least=1), help="for a transformers folder: experts of a token (default: 2; T5: 1)"
    )
    parser.add_argument(
        "--every",
        type=number(int, at_least=1),
        default=1,
        help="for a transformers folder: one of so many layers becomes sparse (default: 1)",
    )
    plain_option(parser, "for a sparse run, where copies of an expert then share its routing weight")
    output_options(parser)


def _upcycle(given: Namespace, console: Console) -> None:
    from moekit.runs.folders.changing import upcycle_folder  # where it is used: a help text needs none of it
    from moekit.runs.surgery.operations import upcycle_run

    if of_folder(given, k=None, every=1):
        said = {name: getattr(given, name) for name in ("every", "noise", "scale", "seed", "overwrite")}
        write_changed(given, console, lambda: upcycle_folder(given.run, given.out, given.experts, given.k, **said))
        return
    options = {"noise": given.noise, "scale": given.scale, "compensated": not given.plain, "seed": given.seed}
    change(given, console, lambda run: upcycle_run(run, given.experts, **options))


COMMAND = Command(
    "Turn the feed-forward layers of a dense model into experts, or copy experts of a sparse one",
    _options,
    _upcycle,
    "  moekit upcycle runs/dense --experts 8 --noise 0.1 --scale 8 --restart --out runs/sparse\n"
    "  moekit upcycle Qwen3-0.6B --experts 8 --k 2 --every 2 --noise 0.01 --out Qwen3-sparse",
)
