"""The command serve."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from moekit.cli.command import RecipeCommand
from moekit.cli.generate import SETTINGS, writer_options
from moekit.cli.training import folder_options, stored_run, stored_settings
from moekit.runs.config import RunConfig
from moekit.runs.recipe import Recipe
from moekit.runs.writer import Writer
from moekit.serving import Limits, serve


def _options(parser: ArgumentParser) -> None:
    limits = Limits()
    folder_options(parser)
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; the default is this machine alone"
    )
    parser.add_argument("--port", type=int, default=8765, help="port to listen on; 0 = any that is free")
    for name, what in (
        ("max_lines", "maximum number of lines of a request"),
        ("max_characters", "maximum number of characters of a line"),
        ("max_waiting", "maximum number of requests that wait while one is answered; more are refused with status 503"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(limits, name), help=what)
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=limits.max_seconds,
        help="maximum time of an answer, the waiting included; then the request is refused with status 504",
    )
    writer_options(parser)


def _serve(recipe: Recipe, config: RunConfig, given: Any) -> None:
    limits = Limits(
        max_lines=given.max_lines,
        max_characters=given.max_characters,
        max_waiting=given.max_waiting,
        max_seconds=given.max_seconds,
    )
    run = stored_run(recipe, given)
    bounds = {"experts_in_memory": given.experts_in_memory, "max_input_tokens": given.max_input_tokens}
    name = run.path.resolve().name.encode("utf-8", errors="replace").decode("utf-8")
    serve(lambda: Writer(run, config, **bounds), name, host=given.host, port=given.port, limits=limits)


COMMAND = RecipeCommand(
    "Answer requests with a trained run: a page for the browser, and JSON", _options, _serve, SETTINGS, stored_settings
)
