"""Questions about agreement: a reader of sentences answers all, whoever knows words alone just half of them."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from moekit.babel import Babel, BabelSettings, Facts
from moekit.babel.concepts import concepts
from moekit.babel.grammar import grammars
from moekit.babel.language import Language
from moekit.babel.meaning import MeaningSampler
from moekit.errors import UserError
from moekit.inference.choices import recall
from moekit.source import ChoiceQuestion

ASKED = ("avl", "tnd", "kmb", "vrs", "nhl", "tsq")
EACH = 60


@pytest.fixture(scope="module", params=["plain", "rich", "facts"])
def corpus(request: pytest.FixtureRequest) -> Babel | Facts:
    if request.param == "facts":
        return Facts(languages=8, entities=300, train_sentences=6_000)
    return Babel(BabelSettings(languages=8, complexity=request.param, train_sentences=3_000))


@pytest.fixture(scope="module")
def asked(corpus: Babel | Facts) -> list[ChoiceQuestion]:
    return [q for code in corpus.languages for q in corpus.agreement_questions(code, each=EACH)]


def words(question: ChoiceQuestion) -> tuple[str, str]:
    """The right and the wrong form, which is all that the sentences differ in."""
    both = [sentence.split() for sentence in question.sentences]
    (differing,) = [column for column in zip(*both, strict=True) if len(set(column)) > 1]
    return differing[question.answer], differing[1 - question.answer]


class Reader:
    """Reads sentences by the tables of a language and its order of words, and not by meanings.

    The subject is the noun in the bare case, or, where nouns have no case, the first: so it is in the languages of
    `ASKED`. An adjective belongs to the nearest noun on its side, an article to the next.
    """

    def __init__(self, language: Language) -> None:
        self.grammar, forms = language.grammar, language.forms
        names, particles = language._is_name, {"", *forms.case_particle}
        self.nouns: dict[str, tuple[int, int, set[int]]] = {}
        for number, by_number in enumerate(forms.noun):
            for plural, by_definite in enumerate(by_number[:1] if names[number] else by_number):
                for by_case in by_definite:
                    for case, word in enumerate(by_case):
                        self.nouns.setdefault(word, (forms.noun_class[number], plural, set()))[2].add(case)
        self.agreeing: dict[str, dict[str, set[tuple[int, int]]]] = {
            kind: defaultdict(set) for kind in ("verb", "adjective", "article")
        }
        for verb in forms.verb:
            spoken = [set(form.split()) for by_tense in verb[0][0] for form in by_tense]
            particles |= set.intersection(*spoken) if len(spoken[0]) > 1 else set()
            for noun_class, by_number in enumerate(verb):
                for plural, by_tense in enumerate(by_number):
                    for form in (form for by_negation in by_tense for form in by_negation):
                        for word in form.split():
                            self.agreeing["verb"][word].add((noun_class, plural))
        for adjective in forms.adjective:
            for noun_class, by_plural in enumerate(adjective):
                for plural, by_case in enumerate(by_plural):
                    for word in by_case:
                        self.agreeing["adjective"][word].add((noun_class, plural))
        for noun_class, by_plural in enumerate(forms.article):
            for plural, word in enumerate(by_plural):
                self.agreeing["article"][word].add((noun_class, plural))
        everything = {(k, p) for k in range(self.grammar.noun_classes) for p in range(2)}
        for kind, table in self.agreeing.items():  # particles go with all nouns, and say nothing
            self.agreeing[kind] = {word: own for word, own in table.items() if own != everything}

    def broken(self, sentence: str) -> list[str]:
        """The kinds of the words that do not agree."""
        said = sentence.split()
        nouns = {place: self.nouns[word] for place, word in enumerate(said) if word in self.nouns}
        before = self.grammar.phrase.index("J") < self.grammar.phrase.index("N")
        found = []
        for kind, table in self.agreeing.items():
            for place, word in enumerate(said):
                if word not in table:
                    continue
                if kind == "verb":
                    head = self.subject(nouns)
                elif kind == "article" or before:
                    head = min(other for other in nouns if other > place)
                else:
                    head = max(other for other in nouns if other < place)
                if nouns[head][:2] not in table[word]:
                    found.append(kind)
        return found

    def subject(self, nouns: dict[int, tuple[int, int, set[int]]]) -> int:
        return min(place for place, noun in nouns.items() if 0 in noun[2])

    def between(self, sentence: str, form: str) -> list[tuple[int, int]]:
        """Class and number of the nouns between the subject and a form of a verb."""
        said = sentence.split()
        nouns = {place: self.nouns[word] for place, word in enumerate(said) if word in self.nouns}
        first, last = sorted((self.subject(nouns), said.index(form)))
        return [noun[:2] for place, noun in nouns.items() if first < place < last]


def test_each_language_is_asked_for_what_its_grammar_has(corpus: Babel | Facts, asked: list[ChoiceQuestion]) -> None:
    found: dict[str, set[str]] = {code: set() for code in corpus.languages}
    for question in asked:
        found[question.language].add(question.kind)
    attracted = {"verb_attractor"} if isinstance(corpus, Babel) and corpus.settings.complexity == "rich" else set()
    wanted = {
        "avl": {"verb", "adjective", "article"} | attracted,
        "tnd": {"verb", "verb_attractor"},
        "kmb": {"verb", "adjective"},
        "vrs": {"verb", "adjective"} | attracted,
        "nhl": {"adjective"},
        "tsq": {"verb"},
    }
    if isinstance(corpus, Facts):  # subjects are names, which are singular, and nothing has adjectives
        wanted = {"avl": {"article"}, "vrs": {"verb"}}
        assert all({"undetermined"} >= kinds - wanted.get(code, set()) for code, kinds in found.items())
        assert {code: kinds - {"undetermined"} for code, kinds in found.items() if kinds} == wanted
    else:
        control = {"undetermined"}
        assert found == {code: wanted[code] | control if code in wanted else set() for code in corpus.languages}


def test_a_reader_finds_the_one_word_that_is_wrong(corpus: Babel | Facts, asked: list[ChoiceQuestion]) -> None:
    """By tables of forms and the order of words alone: the right sentence agrees in all, the wrong one not in one."""
    readers = {code: Reader(corpus._speakers[code]) for code in ASKED}
    asked = [q for q in asked if q.kind != "undetermined"]
    assert len(asked) >= 120
    for question in asked:
        reader, right = readers[question.language], question.sentences[question.answer]
        wrong = question.sentences[1 - question.answer]
        assert not reader.broken(right), right
        assert reader.broken(wrong) == [question.kind.split("_")[0]], wrong
    scores = [[-len(readers[q.language].broken(sentence)) for sentence in q.sentences] for q in asked]
    assert {kind["recall"] for kind in recall(asked, scores)} == {1.0}


def test_attractors_ask_for_the_wrong_form(corpus: Babel | Facts, asked: list[ChoiceQuestion]) -> None:
    number = 0
    readers = {code: Reader(corpus._speakers[code]) for code in ASKED}
    for question in asked:
        if not question.kind.startswith("verb"):
            continue
        reader = readers[question.language]
        right, wrong = (reader.agreeing["verb"][word] for word in words(question))
        between = reader.between(question.sentences[question.answer], words(question)[0])
        if question.kind == "verb":
            assert all(noun in right for noun in between)
        else:
            number += 1
            assert any(noun in wrong for noun in between)
    assert number or isinstance(corpus, Facts)


def test_who_knows_words_alone_answers_just_half(corpus: Babel | Facts, asked: list[ChoiceQuestion]) -> None:
    """Frequency, length, spelling: of each kind and language exactly as many answers are right as are wrong."""
    seen = Counter(
        word for code in corpus.languages for text in corpus.monolingual(code, "train") for word in text.split()
    )
    rng = random.Random(0)
    preference: dict[str, float] = defaultdict(rng.random)
    preferences: list[Callable[[str], float]] = [seen.__getitem__, len, lambda w: -len(w), preference.__getitem__]
    for prefers in preferences:
        for kind in recall(asked, [[sum(map(prefers, s.split())) for s in q.sentences] for q in asked]):
            assert {*kind["languages"].values(), kind["recall"]} == {0.5}
            assert kind["deciles"] == []
    answers = Counter(q.answer for q in asked)
    assert abs(answers[0] - answers[1]) < 5 * len(asked) ** 0.5


def test_every_form_is_right_as_often_as_it_is_wrong(asked: list[ChoiceQuestion]) -> None:
    forms: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    sentences: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in asked:
        right, wrong = words(question)
        of = question.kind, question.language
        forms[of].update({right: 1})
        forms[of].subtract({wrong: 1})
        sentences[of].append(question.sentences[question.answer])
    assert all(not any(counts.values()) for counts in forms.values())
    assert all(len(set(own)) == len(own) <= EACH for own in sentences.values()), "each sentence is asked once"


def test_what_is_asked_is_in_no_training_text(corpus: Babel | Facts, asked: list[ChoiceQuestion]) -> None:
    for code in corpus.languages:
        texts = set(corpus.monolingual(code, "train"))
        pairs = [d for d in corpus.directions if d.source == code][:1]
        texts |= {text for direction in pairs for text, _ in corpus.parallel(direction, "train")}
        assert all(texts.isdisjoint(question.sentences) for question in asked if question.language == code)


def test_neighbours_give_away_what_stands_beside_a_noun_and_no_more() -> None:
    """As the guide says: a model of pairs of neighbouring words knows adjectives and articles, and no verb afar."""
    corpus = Babel(BabelSettings(languages=2))
    found: dict[tuple[str, str], float] = {}
    for code in corpus.languages:
        texts = [["", *text.split(), "."] for text in corpus.monolingual(code, "train")]
        alone = Counter(word for text in texts for word in text)
        pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
        total = alone.total()

        def likely(
            sentence: str, alone: Counter[str] = alone, pairs: Counter[tuple[str, str]] = pairs, total: int = total
        ) -> float:
            said = ["", *sentence.split(), "."]
            smoothed = (
                math.log((pairs[a, b] + 5 * (alone[b] + 0.5) / total) / (alone[a] + 5))
                for a, b in itertools.pairwise(said)
            )
            return sum(smoothed)

        asked = corpus.agreement_questions(code, each=200)
        kinds = recall(asked, [[likely(sentence) for sentence in q.sentences] for q in asked])
        found |= {(code, kind["kind"]): kind["recall"] for kind in kinds}
    assert min(found["avl", kind] for kind in ("adjective", "article")) > 0.95
    assert 0.8 < found["avl", "verb"] < 0.95
    assert all(found["tnd", kind] == pytest.approx(0.5, abs=0.05) for kind in ("verb", "verb_attractor"))
    assert all(found[code, "undetermined"] == pytest.approx(0.5, abs=0.15) for code in corpus.languages)


def test_a_number_of_questions_is_even_and_always_of_the_same() -> None:
    corpus = Babel(BabelSettings(languages=2, train_sentences=100))
    few = corpus.agreement_questions("avl", each=3)
    assert Counter(q.kind for q in few) == dict.fromkeys(("verb", "adjective", "article", "undetermined"), 4)
    assert few == Babel(BabelSettings(languages=2, train_sentences=9)).agreement_questions("avl", each=4)
    assert corpus.agreement_questions("avl", each=0) == []
    with pytest.raises(UserError, match="0 or more questions of each kind of agreement: got -1"):
        corpus.agreement_questions("avl", each=-1)
    with pytest.raises(UserError, match="language must be one of the data: got 'xyz'"):
        corpus.agreement_questions("xyz", each=1)


def test_forms_that_are_spelled_alike_are_not_asked() -> None:
    corpus = Babel(BabelSettings(languages=2, train_sentences=100))
    language = corpus.language("avl")
    language.forms = copy.deepcopy(language.forms)  # all readers of a language have the same
    (one, many), _ = language.forms.article
    language.forms.article = [[one, many], [one, many]]
    language.forms.adjective = [[[by_number[0]] * 2 for by_number in table] for table in language.forms.adjective]
    language.forms.adjective = [[table[0]] * 2 for table in language.forms.adjective]
    asked = corpus.agreement_questions("avl", each=20)
    assert {words(q) for q in asked if q.kind == "article"} == {(one, many), (many, one)}
    assert {q.kind for q in asked} == {"verb", "article", "undetermined"}


def test_text_in_profiles_has_no_agreement() -> None:
    corpus = Facts(languages=5, entities=60, relations=8, profiles=1.0, train_sentences=500)
    assert not any(corpus.agreement_questions(code, each=10) for code in corpus.languages)


def test_marks_are_true_in_any_grammar() -> None:
    """Parts make up the sentence, marked forms are those that stand there, and verbs alone have nouns in between."""
    things = concepts()
    rows = MeaningSampler(things, complexity="rich", seed=1).block("test", 0, 60).tolist()
    for grammar in grammars(40):
        language = Language(grammar, things)
        for row in rows:
            parts, marks = language.marked(row)
            assert " ".join(parts) == language.say(row)
            nouns = {mark.place: mark for mark in marks if not mark.forms}
            assert Counter(mark.kind for mark in nouns.values())["subject"] == 1
            for mark in marks:
                if not mark.forms:
                    continue
                noun_class = language.forms.noun_class[mark.noun - 1]
                assert mark.forms[noun_class][mark.plural] == parts[mark.place]
                head = min(
                    (place for place, noun in nouns.items() if noun.noun == mark.noun and noun.plural == mark.plural),
                    key=lambda place: abs(place - mark.place),
                )
                first, last = sorted((head, mark.place))
                if mark.kind != "verb":
                    assert not any(first < place < last for place in nouns)
                    continue
                subject = next(noun for noun in nouns.values() if noun.kind == "subject")
                assert (subject.noun, subject.plural) == (mark.noun, mark.plural)
