"""Whether the weights of two runs mean the same, so that they may be in one model."""

from __future__ import annotations

import dataclasses

from moekit.errors import UserError
from moekit.runs.plain import differences
from moekit.runs.run import Run
from moekit.runs.settings.fields import free_keys
from moekit.runs.text import tokenizer_digest


def require_same_meaning(first: Run, other: Run) -> None:
    """Make sure that weights of one run mean in the other what they mean in it.

    Raises:
        UserError: the runs are of other recipes, or differ in a setting that weights or vocabulary depend on, or in
            their tokenizers; what differs is named.
    """
    if first.recipe.name != other.recipe.name:
        raise UserError(
            f"{other.path} must be of the recipe {first.recipe.name}, as {first.path} is: got {other.recipe.name}."
        )
    # The seed of babel makes its languages; elsewhere it is the order of examples alone.
    free = [*free_keys(first.config, "surgery"), *([] if "babel" in first.config.data.sources else ["data.seed"])]
    if found := differences(dataclasses.asdict(first.config), dataclasses.asdict(other.config), free):
        key, (here, there) = next(iter(found.items()))
        raise UserError(
            f"{other.path} must have the setting {key} of {first.path}, on which the meaning of weights and vocabulary "
            f"depends: got {there!r} and {here!r}."
        )
    digests = (tokenizer_digest(first), tokenizer_digest(other))
    if None not in digests and digests[0] != digests[1]:
        raise UserError(
            f"{other.path} must have the tokenizer of {first.path}, on which the meaning of its weights depends: got "
            f"{digests[1]} and {digests[0]}, from text that has changed in between."
        )
