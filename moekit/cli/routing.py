"""The command routing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.atomic import replacing, require_writable
from moekit.cli.command import RecipeCommand, location, say
from moekit.cli.trained import folder_option, stored_run, stored_settings
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe

_TEXTS = {"valid": "of validation text", "train": "in training", "test": "of the test text"}


def _options(parser: ArgumentParser) -> None:
    folder_option(parser)
    parser.add_argument(
        "--output", type=location, help="file of the trace of the test text (default: routing_test.npz in the run)"
    )
    parser.add_argument("--figures", type=location, help="folder for figures, as PNG; not given = none are drawn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _routing(recipe: Recipe, config: RunConfig, given: Any) -> None:
    # A list of commands needs none of it.
    from moekit.mechanisms import mechanisms
    from moekit.report import mechanism_figures, mechanism_table
    from moekit.routing_traces import read_trace
    from moekit.runs.routed_text import record_test
    from moekit.runs.routing import recorded, write_mechanisms

    run = stored_run(recipe, given)
    output = None if given.output is None else Path(given.output)
    if output is not None:
        require_writable(output)
    trace = record_test(run, config, output)
    found = {**recorded(run), "test": mechanisms(read_trace(trace))}
    write_mechanisms(run, found)
    if given.json:
        sys.stdout.write(json.dumps({kind: one.to_json() for kind, one in found.items()}, indent=2) + "\n")
    else:
        for kind, one in found.items():
            Terminal().print(mechanism_table(one, of=_TEXTS[kind]))
        say(Terminal(), str(trace))
    for kind, one in found.items() if given.figures else ():
        for name, figure in mechanism_figures(one).items():
            path = Path(given.figures) / f"{kind}-{name}.png"
            with replacing(path) as file:
                figure.savefig(file, format="png", dpi=200, facecolor="white")
            if not given.json:
                say(Terminal(), str(path))


COMMAND = RecipeCommand(
    "Record the routing of a trained run's test text, and show what its experts do", _options, _routing,
    ("train.accelerator", "evaluate.batch_tokens"), stored_settings,
)  # fmt: skip
