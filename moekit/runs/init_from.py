"""Runs that do not start from scratch: what they take from another run."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError, nearest
from moekit.runs.config import RunConfig
from moekit.runs.plain import as_plain
from moekit.runs.recipe import Recipe
from moekit.runs.run import Run
from moekit.runs.settings.fields import check_ranges
from moekit.runs.text import tokenizer_of
from moekit.training.multitask import MultitaskModule

T = TypeVar("T")


class InitFrom(ABC):
    """What a run takes from another run.

    Attributes:
        command: name of the command that makes such a run.
        option: name of the option for the other run.
        purpose: what the other run is for, where it is asked for.
        group: name of the group of settings that say what is taken.
        choices: type of these settings.
        loaded: whether all weights of the network are taken, so that none are drawn and no text is looked at.
        tokenizer: that of the other run.
        record: further settings, for the run's config.yaml.

    Args:
        source: folder or checkpoint of the other run.
        chosen: what is taken.
        config: settings of the new run.
        own: the new run, where it goes on from a checkpoint of its own; else None.

    Raises:
        UserError: there is no other run, or settings do not suit it.
    """

    command: ClassVar[str]
    option: ClassVar[str]
    purpose: ClassVar[str]
    group: ClassVar[str]
    choices: ClassVar[type[Any]]
    loaded: ClassVar[bool] = False
    tokenizer: Tokenizer

    def __init__(self, source: str | None, chosen: Any, config: RunConfig, own: Run | None) -> None:
        if source is None:
            raise UserError(f"{self.command} needs {self.purpose}: give its folder with --{self.option}.")
        check_ranges(chosen, f"{self.group}.")
        self.source, self.chosen, self.goes_on = source, chosen, own is not None
        self.record = {self.option: str(Path(source)), self.group: as_plain(chosen)}
        if own is None:
            return
        if (tokenizer := own.kept_tokenizer) is None:
            raise UserError(f"{own.path} must hold the tokenizer of the run that it started from: it has none.")
        self.tokenizer = tokenizer

    @classmethod
    @abstractmethod
    def starting_config(cls, recipe: Recipe, run: Run, variant: str | None) -> tuple[str, RunConfig]:
        """Variant and settings that the new run begins with, from those of the other.

        Raises:
            UserError: no run with `recipe` and `variant` can start from it.
        """

    @abstractmethod
    def make(self, *parts: Any, **options: Any) -> MultitaskModule:
        """Make the LightningModule, with the arguments of `MultitaskModule`.

        Raises:
            UserError: the other run, or the settings, do not suit the model.
        """

    @abstractmethod
    def note(self, module: MultitaskModule) -> str:
        """One line about the module, for the terminal."""


def starting_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of the run that another starts from.

    Raises:
        UserError: it is not the one of its model.
    """
    tokenizer = tokenizer_of(run)
    if tokenizer.vocab_size != run.vocab_size:
        raise UserError(
            f"the tokenizer of {run.path} must have the {run.vocab_size} pieces of its model: it has "
            f"{tokenizer.vocab_size}."
        )
    return tokenizer


def choices_from(kind: type[T], group: str, given: Mapping[str, Any]) -> T:
    """The settings of what is taken, from plain data.

    Args:
        kind: their dataclass.
        group: its name, for messages.
        given: values by name; what is left out has its default.

    Raises:
        UserError: one is unknown, of another type, out of its range, or none of the words that it may be.
    """
    hints = get_type_hints(kind)
    known = [f.name for f in fields(cast(Any, kind))]
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{group}.{key}: unknown setting. {nearest(key, known)}")
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            raise UserError(f"{group}.{key} must be one of {', '.join(get_args(hints[key]))}: got {value!r}.")
    found = kind(**{key: _typed(hints[key], value, f"{group}.{key}") for key, value in given.items()})
    check_ranges(found, f"{group}.")
    return found


_TYPES = {int: "a whole number", float: "a number", str: "text"}


def _typed(hint: Any, value: Any, key: str) -> Any:
    """A value as its field has it; a number that YAML reads as text, as 1e-3, is one."""
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    if get_origin(hint) is Literal or (value is None and type(None) in allowed):
        return value
    fits = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
    if isinstance(value, bool) or not fits:
        words = next(words for kind, words in _TYPES.items() if kind in allowed)
        raise UserError(f"{key} must be {words}: got {value!r}.")
    return value
