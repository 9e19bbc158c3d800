"""The command merge."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from rich.console import Console

from moekit.cli.command import Command, number
from moekit.cli.folders import FOLDER, of_folder, text_given, text_options, write_changed
from moekit.cli.surgery import change, output_options, part_options, run_option
from moekit.errors import UserError

if TYPE_CHECKING:
    from moekit.runs.run import Run
    from moekit.runs.surgery.operations import Result


def _options(parser: ArgumentParser) -> None:
    run_option(parser, FOLDER)
    parser.add_argument("--by-load", action="store_true", help="weight experts by utilisation (default: equally)")
    parser.add_argument(
        "--scale",
        type=number(float),
        default=1.0,
        help="for a transformers folder: factor on what the averages write (default: 1)",
    )
    part_options(parser)
    output_options(parser)
    text_options(parser, "by whose use experts are weighted with --by-load (training split)")


def _merge(given: Namespace, console: Console) -> None:
    from moekit.runs.folders.changing import merge_folder  # where it is used: a help text needs none of it
    from moekit.runs.surgery.operations import merge_run
    from moekit.runs.surgery.utilisation import measured_load

    if of_folder(given, scale=1.0):
        text = text_given(given)
        if given.by_load != (text is not None):
            raise UserError("the text is that by whose load experts are weighted: give --by-load and --data.path both.")
        options = {"scale": given.scale, "overwrite": given.overwrite}
        write_changed(given, console, lambda: merge_folder(given.run, given.out, text, **options))
        return

    if not given.by_load and (given.language or given.task):
        raise UserError("--language and --task say whose utilisation counts: give --by-load with them.")

    def merged(run: Run) -> Result:
        return merge_run(run, measured_load(run, language=given.language, task=given.task) if given.by_load else None)

    change(given, console, merged)


COMMAND = Command(
    "Average the experts of each layer into a dense model",
    _options,
    _merge,
    "  moekit merge runs/tiny --by-load --restart --out runs/dense\n  moekit merge Qwen3-30B-A3B --out Qwen3-dense",
)
