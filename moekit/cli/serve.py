"""The command serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moekit.cli.command import RecipeCommand
from moekit.cli.trained import WRITER_SETTINGS, folder_option, stored_run, stored_settings, writer_given, writer_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe

_COUNTS = {
    "max_lines": "maximum number of lines of a request",
    "max_characters": "maximum number of characters of a line",
    "max_waiting": "maximum number of requests that wait while one is answered; more are refused with status 503",
}


def _options(parser: ArgumentParser) -> None:
    from moekit.serving import Limits  # a list of commands needs none of it

    limits = Limits()
    folder_option(parser)
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; the default is this machine alone"
    )
    parser.add_argument("--port", type=int, default=8765, help="port to listen on; 0 = any that is free")
    for name, what in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(limits, name), help=what)
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=limits.max_seconds,
        help="maximum time of an answer, the waiting included; then the request is refused with status 504",
    )
    writer_options(parser)


def _serve(recipe: Recipe, config: RunConfig, given: Any) -> None:
    from moekit.runs.writer import Writer
    from moekit.serving import Limits, serve

    limits = Limits(**{name: given[name] for name in ("max_seconds", *_COUNTS)})
    run = stored_run(recipe, given)
    name = run.path.resolve().name.encode("utf-8", errors="replace").decode("utf-8")
    serve(lambda: Writer(run, config, **writer_given(given)), name, host=given.host, port=given.port, limits=limits)


COMMAND = RecipeCommand(
    "Answer requests with a trained run: a page for the browser, and JSON",
    _options,
    _serve,
    WRITER_SETTINGS,
    stored_settings,
)
