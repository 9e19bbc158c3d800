"""Runs that do not start from scratch: what they take from another run, and where their settings begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.recipes._command import Recipe, from_plain, take
from moekit.recipes._run_text import run_tokenizer
from moekit.training.multitask import MultitaskModule
from moekit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from moekit.recipes._surgery.subject import Subject


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        record: further settings, for the run's config.yaml.
        make: makes the LightningModule, with the arguments of `MultitaskModule`.
        tokenizer: of the run that weights or a teacher are from.
        note: one line about the module, for the terminal.
        loaded: whether all weights of the network are the run's.
    """

    record: Mapping[str, Any]
    make: Callable[..., MultitaskModule]
    tokenizer: Tokenizer
    note: Callable[[MultitaskModule], str]
    loaded: bool = False


def open_run(path: str) -> Subject:
    """A run of any recipe, or a checkpoint of one; see `open_subject`."""
    from moekit.recipes._surgery.subject import open_subject  # imports the pipeline, which imports this module

    return open_subject(path)


def tokenizer_of(run: Subject) -> Tokenizer:
    """The tokenizer of a run; see `run_tokenizer`.

    Raises:
        UserError: if it is not the one of its model.
    """
    tokenizer = run_tokenizer(run.config, run.folder, run.loaded.rest, str(run.path))
    if tokenizer.vocab_size != run.vocab_size:
        raise UserError(
            f"the tokenizer of {run.path} must have the {run.vocab_size} pieces of its model: it has "
            f"{tokenizer.vocab_size}."
        )
    return tokenizer


def own_tokenizer(folder: RunFolder) -> Tokenizer:
    """The tokenizer of a run that started from another, and goes on without it.

    Raises:
        UserError: if there is none.
    """
    tokenizer = folder.tokenizer
    if tokenizer is None:
        raise UserError(f"{folder.path} must hold the tokenizer of the run that it started from: it has none.")
    return tokenizer


def default_out(recipe: str, variant: str, command: str) -> Path:
    """Where a run is written that was not told where."""
    return Path(f"runs/{recipe}-{variant}-{command}")


def resumed(recipe: Recipe[Any], argv: Sequence[str], out: Path) -> tuple[str, Any] | None:
    """Variant and settings of the run in `out` where it is to be resumed, else None."""
    if "--resume" not in argv or not (out / "config.yaml").is_file():
        return None
    values = RunFolder(out).config()
    kind = type(next(iter(recipe.variants.values())))
    return str(values.get("variant")), from_plain(kind, values, f"{out}/config.yaml")


def defaults_from_run(
    recipe: Recipe[Any],
    argv: Sequence[str],
    variant: str | None,
    *,
    option: str,
    command: str,
    settings: Callable[[Recipe[Any], Subject, str | None], tuple[str, Any]],
) -> tuple[str, Any] | None:
    """Variant and settings from which a command starts that takes another run; None = the variant's own.

    Args:
        recipe: whose command it is.
        argv: of the command.
        variant: the one that was asked for.
        option: names the other run, for example ``--init_from``.
        command: its name.
        settings: makes them from the other run.
    """
    given, out = take(argv, option)[0], take(argv, "--out")[0]
    if out is not None and (found := resumed(recipe, argv, Path(out))):
        return found
    if given is None:
        return None
    name, config = settings(recipe, open_run(given), variant)
    if out is None and (found := resumed(recipe, argv, default_out(recipe.name, name, command))):
        return found
    return name, config
