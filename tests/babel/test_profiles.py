"""Sentences that tell several facts of one entity: their probabilities, what they cost, and what is held out."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from moekit.babel import Facts
from moekit.babel import knowledge as k
from moekit.babel.knowledge import Knowledge, KnowledgeSettings
from moekit.babel.profiles import LENGTH
from moekit.babel.questions import Questions
from moekit.errors import UserError

MANY = {"languages": 2, "entities": 80, "relations": 8, "values": 12, "unknowable": 10, "one_language": 0.3}


@pytest.fixture(scope="module")
def corpus() -> Facts:
    return Facts(**MANY, profiles=0.7, train_sentences=4_000, valid_sentences=100, test_sentences=100)  # type: ignore[arg-type]


def every_profile(knowledge: Knowledge, language: int | None) -> tuple[k.Ints, list[float]]:
    """All profiles of a language with their probabilities, one after the other."""
    probs = knowledge.probs(language).reshape(knowledge.relations, -1)[: knowledge.link]
    rows, found = [], []
    for entity in range(knowledge.entities):
        told = [relation for relation in range(knowledge.link) if probs[relation, entity] > 0]
        orders = list(itertools.permutations(told, min(len(told), LENGTH))) if told else []
        for order in orders:
            value = int(knowledge.value[order[-1] * knowledge.entities + entity])
            row = [k.PROFILE, entity, order[-1], value, 0, 0, 0, *(r + 1 for r in order)]
            rows.append([*row, *[0] * (k.WIDTH - len(row))])
            found.append(probs[:, entity].sum() / probs.sum() / len(orders))
    return np.array(rows), found


@pytest.mark.parametrize("relations", [2, 7])
def test_their_entropy_is_that_of_the_sentences(relations: int) -> None:
    corpus = Facts(
        languages=2, entities=6, relations=relations, values=4, power=1.0, one_language=0.4, unknowable=1,
        profiles=1.0, train_sentences=0,
    )  # fmt: skip
    knowledge = corpus.knowledge
    for language, code in enumerate(corpus.languages):
        rows, probs = every_profile(knowledge, language)
        assert sum(probs) == pytest.approx(1)
        by_sentence: dict[str, float] = defaultdict(float)
        for row, prob in zip(rows.tolist(), probs, strict=True):
            by_sentence[corpus.say(code, row)] += prob
        assert len(by_sentence) == len(rows), "no two profiles are written alike"
        brute = -sum(p * math.log(p) for p in by_sentence.values())
        assert float(knowledge.entropy(language).knowing) == pytest.approx(brute, rel=1e-9)
        information = knowledge.information(rows, language)
        np.testing.assert_allclose(information.knowing, -np.log(probs), rtol=1e-9)
        assert float(np.dot(probs, information.guessing)) == pytest.approx(float(knowledge.entropy(language).guessing))
        # One who guesses knows how often each relation has each value, in profiles.
        values, relation_told = Counter[tuple[int, int]](), Counter[int]()
        for row, prob in zip(rows.tolist(), probs, strict=True):
            for number in filter(None, row[k.PROFILED]):
                values[number, int(knowledge.value[(number - 1) * 6 + row[k.ENTITY]])] += prob
                relation_told[number] += prob
        for row, cost, guessed in zip(rows.tolist(), information.knowing, information.guessing, strict=True):
            told = [(n, int(knowledge.value[(n - 1) * 6 + row[k.ENTITY]])) for n in row[k.PROFILED] if n]
            assert guessed - cost == pytest.approx(-sum(math.log(values[t] / relation_told[t[0]]) for t in told))


def test_text_has_them_as_often_as_is_set_and_costs_what_the_entropy_says() -> None:
    knowledge = Knowledge(KnowledgeSettings(entities=300, relations=9, values=16, profiles=0.6), 2, 0)
    rows = knowledge.draw(np.random.default_rng(0), 100_000, 1)
    assert (rows[:, k.KIND] == k.PROFILE).mean() == pytest.approx(0.6, abs=0.01)
    costs = knowledge.information(rows, 1)
    for drawn, whole in (
        (costs.knowing, knowledge.entropy(1).knowing),
        (costs.guessing, knowledge.entropy(1).guessing),
    ):
        assert drawn.mean() == pytest.approx(float(whole), abs=4 * drawn.std() / math.sqrt(len(drawn)))


def test_a_profile_tells_true_facts_of_its_language_each_once(corpus: Facts) -> None:
    knowledge = corpus.knowledge
    for number in range(2):
        rows = knowledge.draw_profiles(np.random.default_rng(1), 3_000, number)
        facts = knowledge.profiled(rows)
        told = facts[facts >= 0]
        assert knowledge.allowed(number)[told].all()
        assert (told < knowledge.link * knowledge.entities).all()
        for row in facts[:200]:
            own = row[row >= 0]
            assert len(set(own)) == len(own) > 0
            assert len(set(own % knowledge.entities)) == 1


def test_held_out_profiles_are_in_no_training_text_and_all_they_tell_is(corpus: Facts) -> None:
    for code in corpus.languages:
        training = set(corpus.monolingual(code, "train"))
        for split in ("valid", "test"):
            assert not training & set(corpus.monolingual(code, split))
            rows = corpus.held_out(code, split)
            profiles = rows[rows[:, k.KIND] == k.PROFILE]
            assert len(rows) == 100
            assert len(profiles) == 70
            facts = corpus.knowledge.profiled(profiles)
            assert (corpus.told(code)[facts[facts >= 0]] > 0).all()
            information = corpus.information(code, split)
            assert information is not None
            assert all(math.isfinite(nats) for nats in (*information.knowing, *information.guessing))


def test_what_they_tell_is_counted(corpus: Facts) -> None:
    code, knowledge = corpus.languages[0], corpus.knowledge
    spoken = Counter(corpus.monolingual(code, "train"))
    told, forms = corpus.told(code), np.arange(len(knowledge.forms))
    often = np.argsort(-told)
    for fact in [*often[often < knowledge.link * knowledge.entities][:5], *np.flatnonzero(told == 0)[:5]]:
        facts = np.full(len(forms), fact)
        single = [knowledge.tell(facts, kind, forms) for kind in (k.STATEMENT, k.QUESTION)]
        number = sum(spoken[corpus.say(code, row)] for row in np.concatenate(single).tolist())
        relation, entity = divmod(int(fact), knowledge.entities)
        row = [k.PROFILE, entity, relation, int(knowledge.value[fact]), 0, 0, 0, relation + 1]
        name, _, verb, value = corpus.say(code, row).split()
        in_profiles = [line for line in spoken if line.startswith(f"{name} : ") and f" {verb} {value} " in f"{line} "]
        assert told[fact] == number + sum(spoken[line] for line in in_profiles)


@pytest.mark.parametrize("relations", [1, 3, 8])
def test_text_may_be_profiles_alone(relations: int) -> None:
    corpus = Facts(
        languages=2, entities=60, relations=relations, values=2, unknowable=1, one_language=0.3, profiles=1.0,
        train_sentences=2_000, valid_sentences=20, test_sentences=20,
    )  # fmt: skip
    for number, code in enumerate(corpus.languages):
        rows = corpus.held_out(code, "test")
        assert (rows[:, k.KIND] == k.PROFILE).all()
        information = corpus.information(code, "test")
        assert information is not None
        assert np.isfinite([information.knowing, information.guessing]).all()
        other = corpus.knowledge.tell(np.array([0]), k.STATEMENT, np.array([0]))
        assert np.isinf(corpus.knowledge.information(other, number).knowing).all()
        asked = Questions(corpus.knowledge, number, corpus.told(code), np.random.default_rng(0)).ask(9, 2)
        assert {one.rows[0][k.KIND] for one in asked if one.kind == "known"} <= {k.PROFILE}


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"profiles must be a share from 0 to 1: got 1\.5\."):
        Facts(profiles=1.5)


def test_known_facts_are_asked_at_the_end_of_held_out_profiles(corpus: Facts) -> None:
    knowledge = corpus.knowledge
    for number, code in enumerate(corpus.languages):
        training, told = set(corpus.monolingual(code, "train")), corpus.told(code)
        asked = Questions(knowledge, number, told, np.random.default_rng(0)).ask(each=30, choices=4)
        known = [question for question in asked if question.kind == "known"]
        profiles = [question for question in known if question.rows[0][k.KIND] == k.PROFILE]
        assert 0.4 < len(profiles) / len(known) < 0.9
        for question in profiles:
            true = np.array([question.rows[question.answer]])
            listed = knowledge.profiled(true)[0]
            listed = listed[listed >= 0]
            assert (told[listed] > 0).all()
            assert len(set(listed.tolist())) == len(listed)
            assert knowledge.value[listed[-1]] == true[0, k.VALUE]
            assert knowledge.fact(true)[0] == listed[-1]
            assert knowledge.split(true)[0] == "test"
            said = [corpus.say(code, row) for row in question.rows]
            assert len(set(said)) == 4
            assert len({sentence.rpartition(" ")[0] for sentence in said}) == 1, "they differ in the last word"
            assert not training & set(said)
