"""Questions about words: what is held out, what is as often true, what no text has; and languages of thousands."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from moekit.babel import Babel, BabelSettings
from moekit.babel.concepts import NAME, concepts
from moekit.babel.grammar import grammars
from moekit.babel.language import build_forms
from moekit.errors import UserError
from moekit.inference.choices import recall
from moekit.source import DECILES, ChoiceQuestion, Direction

CHOICES = 4


@pytest.fixture(scope="module")
def corpus() -> Babel:
    sizes = {"kmb": 1_000}
    return Babel(BabelSettings(languages=3, concepts=1_500, train_sentences=3_000, sizes=sizes, cognates=0.0))


@pytest.fixture(scope="module", params=["tnd-avl", "avl-kmb"])
def direction(request: pytest.FixtureRequest) -> Direction:
    return Direction.parse(request.param)


@pytest.fixture(scope="module")
def questions(corpus: Babel, direction: Direction) -> list[ChoiceQuestion]:
    return corpus.word_questions(direction, each=40, choices=CHOICES)


def nouns(corpus: Babel, language: str, text: str) -> list[str]:
    """The nouns of a text, as English without number."""
    known = {noun.gloss for noun in (*corpus.concepts.nouns, *corpus.concepts.unsaid)}
    return [word for gloss in corpus.word_by_word(language, text).split() if (word := gloss.split(".")[0]) in known]


def test_each_kind_and_decile_is_asked(questions: list[ChoiceQuestion], direction: Direction) -> None:
    asked = Counter((question.kind, question.decile) for question in questions)
    assert asked == {("unknowable", None): 400} | {("known", decile): 40 for decile in range(DECILES)}
    assert {(q.source_language, q.language) for q in questions} == {(direction.source, direction.target)}
    assert {len(set(question.sentences)) for question in questions} == {CHOICES}
    assert len({question.source for question in questions}) > 0.99 * len(questions)


def test_sentences_differ_in_one_noun_of_a_kind_and_the_source_has_the_true_one(
    corpus: Babel, questions: list[ChoiceQuestion], direction: Direction
) -> None:
    kinds = {noun.gloss: noun.kind for noun in (*corpus.concepts.nouns, *corpus.concepts.unsaid)}
    for question in questions:
        assert question.source is not None
        said = [Counter(nouns(corpus, direction.target, sentence)) for sentence in question.sentences]
        assert Counter(nouns(corpus, direction.source, question.source)) == said[question.answer]
        rest = said[0] & said[1]
        own = [(bag - rest).total() for bag in said]
        assert own == [1] * CHOICES, "all else is the same"
        changed = {kinds[word] for bag in said for word in bag - rest}
        assert len(changed) == 1
        assert NAME not in changed


def test_agreement_follows_the_noun(corpus: Babel) -> None:
    """In a language with noun classes, words beside the noun differ too where its class does."""
    asked = corpus.word_questions(Direction("tnd", "avl"), each=40, choices=CHOICES)
    differing = []
    for question in asked:
        rows = [sentence.split() for sentence in question.sentences]
        if len({len(row) for row in rows}) == 1:
            differing.append(sum(len(set(column)) > 1 for column in zip(*rows, strict=True)))
    assert max(differing) > 1


def test_what_is_asked_is_in_no_training_text(
    corpus: Babel, questions: list[ChoiceQuestion], direction: Direction
) -> None:
    sources, targets = zip(*corpus.parallel(direction, "train"), strict=True)
    assert not {question.source for question in questions} & set(sources)
    assert not {question.sentences[question.answer] for question in questions} & set(targets)
    seen = Counter(word for text in sources for word in nouns(corpus, direction.source, text))
    told = dict(zip((n.gloss for n in corpus.concepts.nouns), corpus.told(direction).tolist(), strict=True))
    assert {word: number for word, number in told.items() if number} == seen
    kinds = {noun.gloss: noun.kind for noun in corpus.concepts.nouns}
    by_decile: dict[int, list[int]] = {}
    for question in questions:
        own = [Counter(nouns(corpus, direction.target, sentence)) for sentence in question.sentences]
        rest = own[0] & own[1]
        changed = [seen[word] for bag in own for word in bag - rest]
        assert (question.kind == "unknowable") == (not any(changed))
        if question.decile is not None:
            by_decile.setdefault(question.decile, []).append(changed[question.answer])
            (kind,) = {kinds[word] for bag in own for word in bag - rest}
            between = [n for word, n in seen.items() if kinds[word] == kind and min(changed) < n < max(changed)]
            assert len(between) <= CHOICES - 2, "neighbours by frequency"
    means = [float(np.mean(by_decile[decile])) for decile in range(DECILES)]
    assert means == sorted(means, reverse=True)


def test_who_knows_no_word_answers_as_by_chance(
    corpus: Babel, questions: list[ChoiceQuestion], direction: Direction
) -> None:
    """Length, letters, frequency in training text: nothing but the source tells which noun it is."""
    seen = Counter(
        word for text in corpus.monolingual(direction.target, "train") for word in nouns(corpus, direction.target, text)
    )
    rng = random.Random(0)
    preferences: list[Callable[[str], float]] = [
        len,
        lambda s: -len(s),
        lambda s: float(sum(map(ord, s))),
        lambda s: sum(seen[word] for word in nouns(corpus, direction.target, s)),
        lambda s: -sum(seen[word] for word in nouns(corpus, direction.target, s)),
        lambda s: rng.random(),
    ]
    for prefers in preferences:
        found = recall(questions, [[prefers(sentence) for sentence in q.sentences] for q in questions])
        assert [kind["kind"] for kind in found] == ["known", "unknowable"]
        for kind in found:
            assert kind["recall"] == pytest.approx(0.25, abs=4 * (0.19 / kind["questions"]) ** 0.5)
    oracle = recall(questions, [[float(i == q.answer) for i in range(CHOICES)] for q in questions])
    assert {kind["recall"] for kind in oracle} == {1.0}


def test_words_that_are_never_said_leave_all_others_as_they_are(babel: Babel) -> None:
    for code, grammar in zip(babel.languages, grammars(4), strict=True):
        own, without = babel.language(code).forms, build_forms(grammar, concepts())
        said = len(without.noun)
        assert len(own.noun) == said + len(babel.concepts.unsaid)
        assert (own.noun[:said], own.verb, own.adjective) == (without.noun, without.verb, without.adjective)
        unsaid = {word for table in own.noun[said:] for by_number in table for row in by_number for word in row}
        text = set(" ".join(babel.monolingual(code, "train")[:3_000]).split())
        assert not unsaid & text


def test_few_words_are_asked_in_several_sentences() -> None:
    small = Babel(BabelSettings(languages=2, train_sentences=2_000))
    direction = small.directions[0]
    asked = small.word_questions(direction, each=30, choices=3)
    assert len({question.source for question in asked}) > 0.9 * len(asked) > 500
    asked = small.word_questions(direction, each=3, choices=3)
    assert asked == small.word_questions(direction, each=3, choices=3)
    assert asked != small.word_questions(direction.reverse, each=3, choices=3)


def test_bad_questions_are_refused(corpus: Babel) -> None:
    direction = Direction("tnd", "avl")
    for choices in (1, 33):
        with pytest.raises(UserError, match=rf"choices must be from 2 to 32: got {choices}"):
            corpus.word_questions(direction, each=1, choices=choices)
    with pytest.raises(UserError, match="0 or more questions of each decile and kind: got -1"):
        corpus.word_questions(direction, each=-1, choices=4)
    with pytest.raises(UserError, match="language must be one of the data: got 'xyz'"):
        corpus.word_questions(Direction("tnd", "xyz"), each=1, choices=4)


@pytest.mark.parametrize(("number", "languages"), [(1_500, 2), pytest.param(6_000, 8, marks=pytest.mark.slow)])
def test_languages_have_a_word_of_their_own_for_thousands_of_things(number: int, languages: int) -> None:
    """No two things are written alike in a language; and without cognates hardly one in two of them."""
    many = concepts(number)
    assert len(many) == pytest.approx(number, rel=0.02)
    stems = []
    for grammar in grammars(languages):
        forms = build_forms(grammar, many, cognates=0.0)
        words = [table[0][0][0] for table in forms.noun]
        assert len(set(words)) == len(words) == len(many.nouns)
        assert len(forms.verb) == len(many.verbs)
        stems.append({w for w, noun in zip(words, many.nouns, strict=True) if noun.kind != NAME})
    for i, own in enumerate(stems):
        assert all(len(own & other) < 0.02 * len(own) for other in stems[:i])
