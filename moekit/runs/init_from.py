"""Runs that do not start from scratch: what they take from another run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.runs.run import Run
from moekit.runs.text import tokenizer_of
from moekit.training.multitask import MultitaskModule


class InitFrom(ABC):
    """What a run takes from another run.

    Attributes:
        record: further settings, for the run's config.yaml.
        tokenizer: that of the other run.
        loaded: whether all weights of the network are taken, so that none are drawn and no text is looked at.
    """

    record: Mapping[str, Any]
    tokenizer: Tokenizer
    loaded: bool = False

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
        UserError: if it is not the one of its model.
    """
    tokenizer = tokenizer_of(run)
    if tokenizer.vocab_size != run.vocab_size:
        raise UserError(
            f"the tokenizer of {run.path} must have the {run.vocab_size} pieces of its model: it has "
            f"{tokenizer.vocab_size}."
        )
    return tokenizer


def own_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run that started from another, and goes on without it.

    Raises:
        UserError: if there is none.
    """
    tokenizer = run.kept_tokenizer
    if tokenizer is None:
        raise UserError(f"{run.path} must hold the tokenizer of the run that it started from: it has none.")
    return tokenizer
