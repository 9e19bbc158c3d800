"""The command inspect."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from rich.console import Console

from moekit.cli.command import Command, path
from moekit.cli.folders import FOLDER, of_folder, text_given, text_options
from moekit.cli.surgery import RUN, config_option
from moekit.terminal import write_data


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=path, metavar="RUN", help=f"{RUN}, or a state dict file{FOLDER}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config_option(parser)
    text_options(parser, "on which the use of experts is measured (training split)")


def _inspect(given: Namespace, console: Console) -> None:
    from moekit.runs.folders.inspection import inspect_folder, show_folder  # a help text needs none of it
    from moekit.runs.surgery.inspection import inspect, show

    folder = of_folder(given)
    found = inspect_folder(given.path, text_given(given)) if folder else inspect(given.path, given.config)
    if given.json:
        write_data(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        (show_folder if folder else show)(found, console)


COMMAND = Command(
    "Show the sparse layers of a checkpoint: experts, sizes and utilisation",
    _options,
    _inspect,
    "  moekit inspect runs/zcode_m3-tiny\n  moekit inspect runs/zcode_m3-tiny/checkpoints/last.ckpt --json\n"
    "  moekit inspect OLMoE-1B-7B --data.path my-text",
)
