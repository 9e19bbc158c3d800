"""What the commands that use a trained run share: the run, its settings, and text that goes in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moekit.cli.command import location, option_value
from moekit.cli.training import FOLDER, folder
from moekit.data.lines import STANDARD
from moekit.errors import UserError
from moekit.folder_kinds import require_run_folder

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from moekit.runs.config import RunConfig
    from moekit.runs.recipe import Recipe
    from moekit.runs.run import Run


def stored_run(recipe: Recipe, given: Any) -> Run:
    """The run of the options."""
    from moekit.runs.run import Run  # where it is used: a list of commands needs none of it

    return _own(recipe, Run.open(folder(recipe, given.variant, given.out), given.checkpoint))


def _own(recipe: Recipe, run: Run) -> Run:
    require_run_folder(run.path)
    if (name := run.settings.get("recipe")) != recipe.name:
        raise UserError(f"{run.path} must hold a run of {recipe.name}: it is of {name}.")
    return run


def stored_settings(recipe: Recipe, arguments: Sequence[str], variant: str | None) -> tuple[str, RunConfig] | None:
    """Variant and settings of the run that a command uses, on one device of this machine; None where there is none."""
    from moekit.runs.run import Run

    run = Run(folder(recipe, variant or next(iter(recipe.variants)), option_value(arguments, "--out")))
    if not run.in_folder:
        return None
    config = _own(recipe, run).config
    return variant or run.variant, config.changed(train=config.train.elsewhere())


def folder_option(parser: ArgumentParser) -> None:
    """Where the run lies."""
    from moekit.runs.run import CHECKPOINTS

    parser.add_argument("--out", type=location, help=FOLDER)
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="which weights are used (default: the average of the last ones if there is one, else the best, else the "
        "last)",
    )


def text_options(parser: ArgumentParser, source: str, target: str, input: str, default: str | None = STANDARD) -> None:
    """The run, its languages, and what it reads by `default`; the texts are their help."""
    folder_option(parser)
    parser.add_argument("--from", type=str, dest="source_language", help=f"language code of {source}")
    parser.add_argument("--to", type=str, dest="target_language", help=target)
    parser.add_argument("--input", type=location, default=default, help=input)


def text_given(given: Any) -> dict[str, Any]:
    """What `generate` and `score` take alike."""
    return {
        "source": given.source_language,
        "target": given.target_language,
        "input": STANDARD if given.input is None else given.input,
        "output": given.output,
    }


def writer_options(parser: ArgumentParser) -> None:
    """The bounds of commands that write text with a run."""
    parser.add_argument(
        "--experts_in_memory",
        type=int,
        default=0,
        help="maximum number of experts per layer kept in memory; others are mapped from disk when tokens need them. "
        "0 = keep all",
    )
    parser.add_argument(
        "--max_input_tokens",
        type=int,
        help="maximum number of tokens of an input line; longer lines are cut, and a message says so (default: 1024, "
        "or data.max_length if that is more)",
    )


def writer_given(given: Any) -> dict[str, Any]:
    """The bounds as `Writer` takes them."""
    return {"experts_in_memory": given.experts_in_memory, "max_input_tokens": given.max_input_tokens}


SEARCH = ("evaluate.beam_size", "evaluate.length_penalty", "evaluate.batch_tokens")
WRITER_SETTINGS = ("train.accelerator", *SEARCH)
