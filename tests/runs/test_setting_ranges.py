"""Every setting of every recipe with values that make no sense: each is refused by its key."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from moekit.errors import UserError
from moekit.runs import RunConfig, RunText
from moekit.runs.distill import DistillConfig
from moekit.runs.finetune import FineTuneConfig
from moekit.runs.known import recipe_names
from moekit.runs.plain import with_setting
from moekit.runs.recipe import find_recipe
from moekit.runs.settings import setting
from moekit.runs.settings.fields import check_ranges, known_of, missed_range
from moekit.runs.smoke import smoke

SENSELESS = (-1, math.nan, math.inf, -math.inf, 1e30, 10**20)
"""No setting takes them: none may be negative, and above 2 ** 31 - 1 nothing has a meaning."""
RECIPES = recipe_names()


def numbers_of(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and type of the settings of a group that are numbers, lists of them, or mappings to them."""
    for name, hint in typing.get_type_hints(type(group)).items():
        value = getattr(group, name)
        if dataclasses.is_dataclass(value):
            yield from numbers_of(value, f"{prefix}{name}.")
            continue
        parts = {hint, *typing.get_args(hint)} | {x for part in typing.get_args(hint) for x in typing.get_args(part)}
        if parts & {int, float}:
            yield f"{prefix}{name}", hint


def shaped(value: Any, hint: Any) -> Any:
    """A value as a setting of that type has it."""
    if "dict" in str(hint):
        return {"kmb": value}
    return (value, value, value) if "tuple[float, float, float]" in str(hint) else value


def groups() -> Iterator[tuple[str, Any]]:
    yield "fine_tune.", FineTuneConfig()
    yield "distill.", DistillConfig()
    for name in RECIPES:
        yield "", find_recipe(name, "").default


def test_every_number_has_a_range() -> None:
    """A new setting that does not say its range is found here."""
    count = 0
    for prefix, config in groups():
        for key, _ in numbers_of(config, ""):
            *path, name = key.split(".")
            group = config
            for part in path:
                group = getattr(group, part)
            assert known_of(group, name).keys() & {"at_least", "above"}, f"{prefix}{key} of {type(group).__module__}"
            count += 1
    assert count > 400


def test_senseless_numbers_are_refused_by_key() -> None:
    for prefix, config in groups():
        for key, hint in numbers_of(config, ""):
            for value in SENSELESS:
                with pytest.raises(UserError, match=f"^{prefix}{key} must be .*: got"):
                    check_ranges(with_setting(config, key, shaped(value, hint)), prefix)


def test_empty_text_is_refused_by_key() -> None:
    config = find_recipe("hash_layers", "").default
    for key in ("data.cache", "data.tokenizer", "data.pivot", "model.embeddings"):
        for blank in ("", " \t"):
            with pytest.raises(UserError, match=f"^{key} must not be empty"):
                check_ranges(with_setting(config, key, blank))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_model_of_every_accepted_value_is_built_or_refused(name: str) -> None:
    """At the edges of the ranges too no other error than the user's comes out."""
    recipe = find_recipe(name, "")
    for variant in recipe.variants.values():
        check_ranges(variant.config)
    small: RunConfig = smoke(recipe.default)
    built = 0
    for key, _ in numbers_of(small.model, "model."):
        for value in (0, 1, 2, 3, 0.5):
            if isinstance(value, float) and typing.get_type_hints(type(small.model))[key.split(".")[1]] is int:
                continue
            config = with_setting(small, key, value)
            try:
                check_ranges(config)
                recipe.parts(config, RunText(600), "meta")
                built += 1
            except UserError:
                continue
    assert built > 20


@pytest.mark.parametrize(
    ("known", "within", "outside", "words"),
    [
        ({"at_least": 0}, (0, 2**31 - 1), (-1, math.nan), "0 or more"),
        ({"at_least": 0}, (), (2**31, math.inf), "0 or more and at most 2147483647"),
        ({"above": 0, "below": 1}, (0.5, 1e-9), (0, 1, -1, math.nan, math.inf), "greater than 0 and less than 1"),
        ({"at_least": 1, "at_most": 4}, (1, 4), (0, 5, math.inf), "1 or more and at most 4"),
        ({"at_most": 2**32 - 1}, (2**32 - 1, -5), (2**32,), "at most 4294967295"),
        ({}, (-5, 0), (math.nan, -math.inf), "a number"),
    ],
)
def test_the_words_of_a_range(known: dict[str, float], within: Any, outside: Any, words: str) -> None:
    assert [missed_range(number, known) for number in within] == [""] * len(within)
    assert [missed_range(number, known) for number in outside] == [words] * len(outside)


def test_lists_and_mappings_are_held_to_the_range_of_their_numbers() -> None:
    @dataclasses.dataclass(frozen=True)
    class Group:
        shares: tuple[float, ...] = setting((0.5,), at_least=0, at_most=1)
        sizes: Any = setting(None, at_least=1)

    check_ranges(Group((0, 1), {"a": 1}))
    with pytest.raises(UserError, match=r"shares must be numbers of 0 or more and at most 1: got \[0.5, 2\]"):
        check_ranges(Group((0.5, 2)))
    with pytest.raises(UserError, match=r"sizes must be numbers of 1 or more: got \{'a': 0\}"):
        check_ranges(Group(sizes={"a": 0}))
