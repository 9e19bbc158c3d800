"""The command plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand, number
from moekit.terminal import Terminal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe


def _options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=number(float, above=0),
        help="device memory in GiB; shows if the model fits and the fewest devices",
    )
    parser.add_argument(
        "--sequences", type=number(int, at_least=1), default=8, help="number of sequences in a device's micro-batch"
    )
    parser.add_argument(
        "--length", type=number(int, at_least=1), help="tokens in a sequence (default: data.max_length)"
    )


def _plan(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.plan import forecast  # a list of commands needs none of it

    sizes = {name: given[name] for name in ("memory", "sequences", "length")}
    forecast(recipe, given.variant, config, Terminal(), **sizes)


COMMAND = RecipeCommand("Estimate memory, FLOPs and communication without running the model", _options, _plan)
