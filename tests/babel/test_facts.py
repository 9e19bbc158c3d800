"""The corpus that knows things: what is told where, what is held out, and what its sentences cost."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from moekit.babel import Facts
from moekit.babel import knowledge as k
from moekit.babel.knowledge import Knowledge, KnowledgeSettings
from moekit.babel.questions import Questions
from moekit.errors import UserError
from moekit.source import DECILES, Direction

SMALL = {"languages": 2, "entities": 60, "relations": 3, "values": 12, "unknowable": 20}


@pytest.fixture(scope="module")
def corpus() -> Facts:
    return Facts(**SMALL, train_sentences=6_000, valid_sentences=150, test_sentences=150, one_language=0.3)


def every_telling(knowledge: Knowledge, language: int | None) -> tuple[k.Ints, list[float]]:
    """All tellings of a language with their probabilities, by multiplication."""
    probs = knowledge.probs(language)
    compositions = knowledge.compositions(language)
    rows, found = [], []
    for number, form_prob in enumerate(knowledge.form_probs):
        form = np.array([number])
        for fact in np.flatnonzero(probs):
            for kind, share in ((k.STATEMENT, 0.9 * 0.75), (k.QUESTION, 0.9 * 0.25)):
                rows.append(knowledge.tell(np.array([fact]), kind, form))
                found.append(share * probs[fact] * form_prob)
        for entity, second in compositions:
            rows.append(knowledge.compose(np.array([entity]), np.array([second]), form))
            found.append(0.1 * form_prob / len(compositions))
    return np.concatenate(rows), found


@pytest.mark.parametrize("language", [0, 1])
def test_entropy_is_that_of_the_sentences(language: int) -> None:
    corpus = Facts(
        languages=2, entities=6, relations=2, values=4, power=1.0, one_language=0.3, unknowable=1, train_sentences=0
    )
    knowledge, code = corpus.knowledge, corpus.languages[language]
    rows, probs = every_telling(knowledge, language)
    assert sum(probs) == pytest.approx(1)
    by_sentence: dict[str, float] = defaultdict(float)
    for row, prob in zip(rows.tolist(), probs, strict=True):
        by_sentence[corpus.say(code, row)] += prob
    assert len(by_sentence) == len(rows), "no two tellings are written alike"
    brute = -sum(p * math.log(p) for p in by_sentence.values())
    assert float(knowledge.entropy(language).knowing) == pytest.approx(brute, rel=1e-9)
    information = knowledge.information(rows, language)
    np.testing.assert_allclose(information.knowing, -np.log(probs), rtol=1e-9)
    assert float(np.dot(probs, information.guessing)) == pytest.approx(float(knowledge.entropy(language).guessing))


def test_guessing_is_a_model_of_independent_values() -> None:
    corpus = Facts(languages=2, entities=8, relations=2, values=3, power=1.0, unknowable=1, train_sentences=0)
    knowledge = corpus.knowledge
    rows, probs = every_telling(knowledge, 0)
    # The same by counting: p(everything but the value) * p(value | relation that gives it, composed or not).
    rest: dict[tuple[int, ...], float] = defaultdict(float)
    values: dict[tuple[bool, int, int], float] = defaultdict(float)
    relations: dict[tuple[bool, int], float] = defaultdict(float)

    def asked(row: list[int]) -> tuple[bool, int]:
        composed = row[k.KIND] == k.COMPOSITION
        return composed, row[k.SECOND] if composed else row[k.RELATION]

    for row, prob in zip(rows.tolist(), probs, strict=True):
        rest[tuple(c for i, c in enumerate(row) if i != k.VALUE)] += prob
        relations[asked(row)] += prob
        values[(*asked(row), row[k.VALUE])] += prob
    cost = 0.0
    for row, prob in zip(rows.tolist(), probs, strict=True):
        share = values[(*asked(row), row[k.VALUE])] / relations[asked(row)]
        cost -= prob * math.log(rest[tuple(c for i, c in enumerate(row) if i != k.VALUE)] * share)
    assert float(knowledge.entropy(0).guessing) == pytest.approx(cost)


def test_held_out_text_costs_what_the_entropy_says() -> None:
    knowledge = Knowledge(KnowledgeSettings(entities=400, relations=3, values=16), 2, 0)
    rows = knowledge.draw(np.random.default_rng(0), 200_000, 1)
    costs = knowledge.information(rows, 1)
    for drawn, whole in (
        (costs.knowing, knowledge.entropy(1).knowing),
        (costs.guessing, knowledge.entropy(1).guessing),
    ):
        assert drawn.mean() == pytest.approx(float(whole), abs=4 * drawn.std() / math.sqrt(len(drawn)))


def test_frequencies_follow_the_power_law() -> None:
    settings = KnowledgeSettings(entities=500, relations=3, values=16, power=1.2, one_language=0.0)
    knowledge = Knowledge(settings, 2, 3)
    assert knowledge.weight.sum() == pytest.approx(1)
    by_entity = knowledge.weight.reshape(4, 500)
    assert (by_entity == by_entity[0]).all()
    falling = np.sort(by_entity[0])[::-1]
    np.testing.assert_allclose(falling / falling[0], ((np.arange(500) + 10) / 10) ** -1.2)
    rows = knowledge.draw(np.random.default_rng(1), 100_000, 0)
    counts = np.bincount(knowledge.fact(rows[rows[:, k.KIND] != k.COMPOSITION]), minlength=2_000)
    top, rest = np.argsort(-knowledge.weight)[:100], np.argsort(-knowledge.weight)[100:]
    for part in (top, rest):
        share = knowledge.weight[part].sum()
        assert counts[part].sum() / counts.sum() == pytest.approx(share, abs=0.01)


def test_the_link_is_a_bijection_and_values_are_even() -> None:
    knowledge = Knowledge(KnowledgeSettings(entities=4_000, relations=2, values=8), 2, 0)
    link = knowledge.value[knowledge.link * 4_000 :]
    assert sorted(link) == list(range(4_000))
    assert (link != np.arange(4_000)).all()
    counts = np.bincount(knowledge.value[:4_000], minlength=8)
    assert np.abs(counts - 500).max() < 5 * math.sqrt(500)


def test_held_out_forms_are_of_facts_that_training_tells_otherwise(corpus: Facts) -> None:
    for code in corpus.languages:
        training = set(corpus.monolingual(code, "train"))
        for split in ("valid", "test"):
            held_out = list(corpus.monolingual(code, split))
            assert len(set(held_out)) == len(held_out)
            assert not training & set(held_out)
            rows = corpus.held_out(code, split)
            assert (corpus.told(code)[corpus.knowledge.fact(rows)] > 0).all()


def test_told_counts_the_training_text(corpus: Facts) -> None:
    code = corpus.languages[1]
    knowledge, told = corpus.knowledge, corpus.told(code)
    spoken = Counter(corpus.monolingual(code, "train"))
    for fact in [*np.argsort(-told)[:5], *np.flatnonzero(told == 0)[:5]]:
        forms = np.arange(len(knowledge.forms))
        rows = [knowledge.tell(np.full(len(forms), fact), kind, forms) for kind in (k.STATEMENT, k.QUESTION)]
        assert sum(spoken[corpus.say(code, row)] for row in np.concatenate(rows).tolist()) == told[fact]


def test_questions_keep_their_promises(corpus: Facts) -> None:
    for code in corpus.languages:
        training = set(corpus.monolingual(code, "train"))
        names = {word for sentence in training for word in sentence.split()}
        glosses = {noun.gloss for noun in corpus.concepts.nouns[2 + SMALL["entities"] :][: SMALL["unknowable"]]}
        questions = corpus.questions(code, each=5, choices=4)
        kinds = Counter(question.kind for question in questions)
        assert set(kinds) == {"known", "composed", "unknowable"}
        assert kinds["unknowable"] == 5 * DECILES
        for question in questions:
            assert len(set(question.sentences)) == 4
            assert question.language == code
            assert not training & set(question.sentences[question.answer : question.answer + 1])
            said = corpus.word_by_word(code, question.sentences[question.answer])
            assert said is not None
            unknown = glosses & {word.split(".")[0] for word in said.split()}
            assert bool(unknown) == (question.kind == "unknowable")
            assert (question.decile is None) == (question.kind == "unknowable")
        assert not any(
            glosses & {word.split(".")[0] for word in (corpus.word_by_word(code, name) or "").split()} for name in names
        )
        answers = Counter(question.answer for question in questions)
        assert set(answers) == {0, 1, 2, 3}


def test_frequencies_alone_answer_as_by_chance() -> None:
    """One who always takes the value that is told most often of the relation, over forty corpora."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for seed in range(40):
        corpus = Facts(languages=2, entities=120, relations=2, values=16, train_sentences=4_000, power=1.0, seed=seed)
        knowledge, told = corpus.knowledge, corpus.told("avl")
        frequency = Counter[tuple[int, int]]()
        for fact, count in enumerate(told.tolist()):
            frequency[fact // knowledge.entities, int(knowledge.value[fact])] += count
        questions = Questions(knowledge, 0, told, np.random.default_rng(seed))
        for kind, _, rows, answer in questions.ask(each=20, choices=4):
            relation = rows[0][k.SECOND if kind == "composed" else k.RELATION]
            guess = max(range(4), key=lambda n: frequency[relation, rows[n][k.VALUE]])
            right[kind] += guess == answer
            asked[kind] += 1
    for kind, number in asked.items():
        error = (0.25 * 0.75 / number) ** 0.5
        assert abs(right[kind] / number - 0.25) < 4 * error, f"{kind}: {right[kind] / number:.3f} of {number}"


def test_true_sentences_are_true_and_others_false(corpus: Facts) -> None:
    """Of a sentence in another form, in training, the true value can be read: an oracle is always right."""
    code = corpus.languages[0]
    knowledge, facts = corpus.knowledge, set[str]()
    forms = range(len(knowledge.forms))
    for fact, kind, form in itertools.product(range(len(knowledge.value)), (k.STATEMENT, k.QUESTION), forms):
        facts.add(corpus.say(code, knowledge.tell(np.array([fact]), kind, np.array([form]))[0].tolist()))
    entity, second = knowledge.compositions(0).T
    for form in forms:
        rows = knowledge.compose(entity, second, np.full(len(entity), form))
        facts |= {corpus.say(code, row) for row in rows.tolist()}
    for question in corpus.questions(code, each=20, choices=5):
        true = [sentence in facts for sentence in question.sentences]
        expected = [number == question.answer for number in range(5)]
        assert true == ([False] * 5 if question.kind == "unknowable" else expected)


def test_compositions_are_held_out_whole_and_their_parts_are_told(corpus: Facts) -> None:
    knowledge, code = corpus.knowledge, corpus.languages[0]
    entity, second = knowledge.compositions(0).T
    splits = [knowledge.split(knowledge.compose(entity, second, np.full(len(entity), form))) for form in range(27)]
    assert all((split == splits[0]).all() for split in splits)
    assert {*splits[0]} == {"train", "valid", "test"}
    composed = {s for s in corpus.monolingual(code, "train") if "that" in (corpus.word_by_word(code, s) or "").split()}
    asked = [q for q in corpus.questions(code, each=50, choices=3) if q.kind == "composed"]
    assert composed
    assert asked
    told = corpus.told(code)
    held_out = splits[0] == "test"
    parts = {
        corpus.say(code, knowledge.compose(entity[[i]], second[[i]], np.array([form]))[0].tolist()): i
        for i in np.flatnonzero(held_out)
        for form in range(27)
    }
    assert not composed & parts.keys()
    for question in asked:
        i = parts[question.sentences[question.answer]]
        assert told[knowledge.first_fact(entity[i])]
        assert told[knowledge.second_fact(entity[i], second[i])]


def test_facts_of_one_language_are_told_nowhere_else(corpus: Facts) -> None:
    knowledge = corpus.knowledge
    assert 0.2 < (knowledge.only >= 0).mean() < 0.4
    for number, code in enumerate(corpus.languages):
        elsewhere = (knowledge.only >= 0) & (knowledge.only != number)
        assert elsewhere.any()
        assert not corpus.told(code)[elsewhere].any()
        assert corpus.told(code)[knowledge.only == number].any()
    assert not corpus.told(None)[knowledge.only >= 0].any()
    # Not in a composition either: of the link and of the value behind it.
    for number in range(2):
        entity, second = knowledge.compositions(number).T
        for fact in (knowledge.first_fact(entity), knowledge.second_fact(entity, second)):
            assert set(knowledge.only[fact]) <= {-1, number}


def test_parallel_text_says_the_same_fact(corpus: Facts) -> None:
    there, back = corpus.directions
    assert back == Direction(there.target, there.source)
    pairs = corpus.parallel(there, "train")
    assert [pair[::-1] for pair in corpus.parallel(back, "train")[:20]] == pairs[:20]
    rows = corpus.held_out(None, "valid").tolist()
    for (source, target), row in zip(corpus.parallel(there, "valid"), rows, strict=True):
        assert (source, target) == (corpus.say(there.source, row), corpus.say(there.target, row))


def test_the_same_seed_says_the_same() -> None:
    def first(seed: int) -> list[str]:
        corpus = Facts(**SMALL, train_sentences=50, valid_sentences=3, test_sentences=3, seed=seed)
        return [*corpus.monolingual(corpus.languages[1], "train"), corpus.fingerprint()]

    assert first(0) == first(0)
    assert not set(first(0)) & set(first(1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"entities": 3}, "entities must be at least 4: got 3"),
        ({"values": 1}, "values must be at least 2: got 1"),
        ({"relations": 0}, "relations must be at least 1: got 0"),
        ({"power": -1.0}, "power must not be negative"),
        ({"power": math.nan}, "power must be a number up to 40: got nan"),
        ({"power": math.inf}, "power must be a number up to 40: got inf"),
        ({"one_language": 1.0}, "one_language must be a share"),
        ({"train_sentences": -1}, "train_sentences must not be negative"),
        ({"languages": 1}, "languages must be at least 2: got 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Facts(**{**SMALL, "train_sentences": 500, **settings})  # type: ignore[arg-type]


def test_there_is_no_more_held_out_text_than_there_are_forms() -> None:
    corpus = Facts(**SMALL, train_sentences=50, valid_sentences=10**6)
    for code in (*corpus.languages, None):
        told = np.flatnonzero(corpus.told(code))
        knowledge, forms = corpus.knowledge, range(len(corpus.knowledge.forms))
        every = [
            knowledge.tell(told, kind, np.full(len(told), form))
            for kind, form in itertools.product((k.STATEMENT, k.QUESTION), forms)
        ]
        rows = np.concatenate(every)
        expected = rows[knowledge.split(rows) == "valid"].tolist()
        assert 0 < len(expected) < 200
        assert sorted(corpus.held_out(code, "valid").tolist()) == sorted(expected)
    code = corpus.languages[0]
    assert len(corpus.monolingual(code, "valid")) == len(corpus.held_out(code, "valid"))
    nothing = Facts(**SMALL, train_sentences=0)
    assert list(nothing.monolingual(code, "train")) == list(nothing.monolingual(code, "test")) == []
    assert {question.kind for question in nothing.questions(code, each=1, choices=2)} == {"unknowable"}


def test_held_out_text_is_drawn_by_frequency() -> None:
    corpus = Facts(**{**SMALL, "power": 2.0, "one_language": 0.0}, train_sentences=20_000, test_sentences=60)
    knowledge, told = corpus.knowledge, np.flatnonzero(corpus.told(None))
    taken = knowledge.weight[knowledge.fact(corpus.held_out(None, "test"))]
    assert np.median(taken) > 2 * np.median(knowledge.weight[told])


def test_more_choices_than_there_are_others_to_link_to_are_refused() -> None:
    corpus = Facts(**{**SMALL, "entities": 6, "one_language": 0.0}, train_sentences=500)  # type: ignore[arg-type]
    code = corpus.languages[0]
    for question in corpus.questions(code, each=9, choices=5):
        assert len(question.sentences) == 5
        assert question.answer < 5
    with pytest.raises(UserError, match="choices must be fewer than entities, 6: got 6"):
        corpus.questions(code, each=9, choices=6)
    with pytest.raises(UserError, match="there must be 0 or more questions of each decile and kind: got -1"):
        corpus.questions(code, each=-1, choices=2)


def test_nobody_is_told_anything_by_no_text() -> None:
    corpus = Facts(**{**SMALL, "profiles": 0.5}, train_sentences=0)  # type: ignore[arg-type]
    found = corpus.information(corpus.languages[0], "test")
    assert found is not None
    assert (len(found.knowing), len(found.guessing)) == (0, 0)


def test_more_choices_than_values_are_refused(corpus: Facts) -> None:
    with pytest.raises(UserError, match="choices must be from 2 to the number of values, 12: got 13"):
        corpus.questions(corpus.languages[0], each=1, choices=13)


@pytest.mark.parametrize("languages", [2, 8])
def test_salient_words_are_the_values_in_every_form(languages: int) -> None:
    """By the glosses of the text: each value is salient, with its article, and no other word is."""
    corpus = Facts(
        languages=languages, entities=40, relations=5, values=6, unknowable=2, profiles=0.4, train_sentences=400
    )
    kinds = ("thing", "place", "food", "animal")
    for code in corpus.languages:
        salient = corpus.salient(code)
        words = {word for phrase in salient for word in phrase.split()}
        told = 0
        for sentence in corpus.monolingual(code, "train"):
            for word in sentence.split():
                gloss = corpus.word_by_word(code, word) or ""
                if gloss.startswith(kinds):
                    assert word in salient, (code, word, gloss)
                    told += 1
                else:
                    assert word not in salient, (code, word, gloss)
                    assert word not in words or gloss == "the", (code, word, gloss)
        assert told > 400
    with pytest.raises(UserError, match="must be one of the data: got 'xx'"):
        corpus.salient("xx")
