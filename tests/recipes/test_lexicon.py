"""The variants `lexicon`: what they ask for is there, and their twins differ in the experts alone."""

from __future__ import annotations

import pytest

from moekit.recipes import gshard, sparse_translation, zcode_m3
from moekit.runs import Recipe
from moekit.runs.plain import as_plain, differences
from moekit.source import DECILES

RECIPES = [gshard.RECIPE, sparse_translation.RECIPE, zcode_m3.RECIPE]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_words_of_all_frequencies_are_asked_and_some_that_nobody_knows(recipe: Recipe) -> None:
    config = recipe.variants["lexicon"].config
    source, wanted = config.data.open(), config.evaluate.words
    knowing = config.data.dictionary()
    assert knowing is not None
    assert wanted >= 10
    direction = source.directions[0]
    asked = knowing.word_questions(direction, each=wanted, choices=config.evaluate.choices)
    counts = [sum(question.decile == decile for question in asked) for decile in range(DECILES)]
    assert counts == [wanted] * DECILES
    assert sum(question.kind == "unknowable" for question in asked) == DECILES * wanted
    assert source.parallel(direction, "test")[3] == knowing.parallel(direction, "test")[3]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_twins_differ_in_the_experts_alone(recipe: Recipe) -> None:
    settings = [as_plain(recipe.variants[name].config) for name in ("lexicon", "lexicon_dense")]
    assert differences(*settings) == {"model.num_experts": (16, 0)}
