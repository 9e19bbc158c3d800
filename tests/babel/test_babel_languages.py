"""Languages of the generated corpus: one meaning, one sentence, the promised grammars, and what is said."""

import numpy as np
import pytest
from meanings_by_hand import noun, row, verb

from moekit.babel import Babel, BabelSettings, Meaning
from moekit.babel import meaning as m
from moekit.babel.concepts import ADVERBS, DEFAULT_CONCEPTS, MINIMUM_CONCEPTS, concepts
from moekit.babel.grammar import grammars
from moekit.babel.meaning import MeaningSampler
from moekit.source import Direction

# -- truth: one meaning, one sentence, and back ----------------------------------------------------------------------


@pytest.mark.parametrize("complexity", ["plain", "rich"])
def test_different_meanings_never_sound_alike(complexity):
    # The fewer the words, the sooner an ambiguity of the grammar shows. Twenty languages include drawn ones.
    corpus = Babel(BabelSettings(languages=20, concepts=MINIMUM_CONCEPTS, complexity=complexity, seed=3))
    sampler = MeaningSampler(corpus.concepts, complexity=complexity, seed=3)
    rows = np.unique(sampler.draw(np.random.default_rng(3), 8_000), axis=0).tolist()
    assert len(rows) > 5_000
    for code in corpus.languages:
        heard: dict[str, list[int]] = {}
        for meaning in rows:
            sentence = corpus.language(code).say(meaning)
            other = heard.setdefault(sentence, meaning)
            assert other == meaning, (
                f"{code}: {sentence!r} says {Meaning.read(meaning, corpus.concepts)} and "
                f"{Meaning.read(other, corpus.concepts)}"
            )


@pytest.mark.parametrize("number", [8, 16])
def test_no_two_words_of_a_language_are_written_alike(number):
    corpus = Babel(BabelSettings(languages=number, concepts=400, seed=number))
    for code in corpus.languages:
        forms = corpus.language(code).forms
        owner: dict[str, str] = {}
        single = {
            **{f"numeral{i}": [w] for i, w in enumerate(forms.numeral)},
            **{f"demonstrative{i}": [w] for i, w in enumerate(forms.demonstrative)},
            **{f"adposition{i}": [w] for i, w in enumerate(forms.adposition)},
            **{f"adverb{i}": [w] for i, w in enumerate(forms.adverb)},
            **{f"noun{i}": _leaves(table) for i, table in enumerate(forms.noun)},
            **{f"adjective{i}": _leaves(table) for i, table in enumerate(forms.adjective)},
            **{f"verb{i}": _leaves(table) for i, table in enumerate(forms.verb)},
        }
        for what, words in single.items():
            for word in words:
                assert owner.setdefault(word, what) == what, f"{code}: {word} is {what} and {owner[word]}"


@pytest.mark.parametrize("complexity", ["plain", "rich"])
def test_a_gloss_has_the_words_of_the_meaning(complexity):
    corpus = Babel(BabelSettings(languages=12, complexity=complexity, train_sentences=60))
    known, sampler = corpus.concepts, MeaningSampler(corpus.concepts, complexity=complexity, seed=0)
    for meaning in sampler.draw(np.random.default_rng(1), 60).tolist():
        said = Meaning.read(meaning, known)
        for code in corpus.languages:
            sentence = corpus.language(code).say(meaning)
            gloss = corpus.word_by_word(code, sentence)
            words = [word.split(".")[0] for word in gloss.split()]
            assert len(words) == len(sentence.split())
            assert "?" not in gloss
            assert known.verbs[meaning[m.VERB] - 1].gloss in words, (said, gloss)
            assert known.nouns[meaning[m.SUBJECT] - 1].gloss in words, (said, gloss)
            if meaning[m.ADVERB]:
                assert ADVERBS[meaning[m.ADVERB] - 1][0] in words, (said, gloss)


def test_a_gloss_tells_number_tense_and_negation_where_the_word_does():
    corpus = Babel(BabelSettings(languages=4))
    for code in corpus.languages:
        language = corpus.language(code)
        glosses = set(language.forms.glosses.values())
        grammar = language.grammar
        if grammar.number in ("prefix", "suffix", "reduplication") or grammar.noun_classes > 1:
            assert {"dog", "dog.PL"} <= glosses, code
        if grammar.tense in ("prefix", "suffix"):
            assert {"sleep.PAST", "sleep", "sleep.FUT"} <= glosses, code
        else:
            assert {"PAST", "FUT", "sleep"} <= glosses, code
    assert corpus.word_by_word(corpus.languages[0], "") == ""


def test_what_is_no_word_is_shown_as_such():
    corpus = Babel(BabelSettings(languages=2))
    code = corpus.languages[0]
    word = next(word for word, gloss in corpus.language(code).forms.glosses.items() if gloss == "dog")
    assert corpus.word_by_word(code, f"{word} xyzzy ___ <unk> .") == "dog [xyzzy?] ___ [<unk>?] ."
    assert corpus.word_by_word("none", word) is None


def _leaves(table) -> list[str]:
    return [table] if isinstance(table, str) else [leaf for part in table for leaf in _leaves(part)]


@pytest.mark.parametrize(
    "column", ["TENSE", "NEGATIVE", "ADVERB", "ADPOSITION", "count", "object", "demonstrative", "adjective"]
)
def test_whatever_a_meaning_holds_is_heard_in_every_language(babel, column):
    base = dict(VERB=verb(babel, "see"), SUBJECT=noun(babel, "king"), OBJECT=noun(babel, "dog"), TENSE=0, ADVERB=1)
    base |= {"ADPOSITION": 1, "LOCATION": noun(babel, "house")}
    for code in babel.languages:
        before = row(**base)
        after = list(before)
        place = {
            "count": m.OBJECT + m.COUNT,
            "object": m.OBJECT,
            "demonstrative": m.OBJECT + m.DEMONSTRATIVE,
            "adjective": m.OBJECT + m.ADJECTIVE,
        }.get(column)
        after[getattr(m, column) if place is None else place] += 1
        assert babel.language(code).say(before) != babel.language(code).say(after)


# -- grammar ---------------------------------------------------------------------------------------------------------


def test_word_order_is_the_one_that_the_grammar_says():
    corpus = Babel(BabelSettings(languages=12))
    orders = set()
    for code in corpus.languages:
        language = corpus.language(code)
        mira, king = noun(corpus, "mira"), noun(corpus, "tomas")
        see = verb(corpus, "see")
        words = language.say(row(VERB=see, TENSE=0, SUBJECT=mira, OBJECT=king)).split()
        stems = {
            "S": language.forms.noun[mira - 1][0][0][0],
            "V": language.forms.verb[see - 1][language.forms.noun_class[mira - 1]][0][0][0],
            "O": language.forms.noun[king - 1][0][0][1],
        }
        heard = "".join(sorted(stems, key=lambda letter: words.index(stems[letter].split()[-1])))
        assert heard == language.grammar.order
        orders.add(heard)
    assert {"SVO", "SOV", "VSO", "VOS", "OVS"} <= orders


def test_the_four_default_languages_differ_where_it_matters(babel):
    rules = [babel.language(code).grammar for code in babel.languages]
    assert {rule.order for rule in rules} >= {"SVO", "SOV", "VSO"}
    assert {rule.prepositions for rule in rules} == {True, False}
    assert {rule.case for rule in rules} >= {"none", "suffix"}
    assert {rule.tense for rule in rules} >= {"suffix", "prefix", "after"}
    assert {rule.verb_agrees for rule in rules} == {"no", "number", "class"}
    assert len({rule.phrase.index("J") < rule.phrase.index("N") for rule in rules}) == 2
    assert any(rule.article == "word" for rule in rules)
    assert any(rule.article == "none" for rule in rules)


def test_vowel_harmony_keeps_a_word_on_one_side(babel):
    back, front = set("aou"), set("eöü")
    table = babel.language("tnd").forms
    words = [word for word in _leaves(table.noun) + _leaves(table.verb) if " " not in word]
    assert any(set(word) & front for word in words)
    assert any(set(word) & back for word in words)
    for word in words:
        assert not (set(word) & back and set(word) & front), word


def test_agreement_follows_the_noun(babel):
    # In Kimbazi adjective and verb begin with the prefix of the subject's class and number.
    language = babel.language("kmb")
    king, dog = noun(babel, "king"), noun(babel, "dog")
    sleep = verb(babel, "sleep")
    sentences = [language.say(row(VERB=sleep, SUBJECT=who)) for who in (king, dog)]
    verbs = [sentence.split()[0] for sentence in sentences]
    assert verbs[0] != verbs[1]
    plural = row(VERB=sleep, SUBJECT=king)
    plural[m.SUBJECT + m.COUNT] = 1
    assert language.say(plural).split()[0] not in verbs


def test_plural_is_left_out_after_numerals_where_the_grammar_says(babel):
    for code, expected in (("avl", True), ("tnd", False)):
        table = babel.language(code).forms
        dog = noun(babel, "dog")
        three = row(VERB=verb(babel, "sleep"), SUBJECT=dog)
        three[m.SUBJECT + m.COUNT] = 3
        words = babel.language(code).say(three).split()
        assert (table.noun[dog - 1][1][0][0] in words) is expected
        assert (table.noun[dog - 1][0][0][0] in words) is not expected


@pytest.mark.parametrize("seed", range(3))
def test_drawn_languages_have_codes_of_their_own_and_every_letter_of_the_order(seed):
    rules = grammars(60, seed)
    assert len({rule.code for rule in rules}) == 60
    for rule in rules:
        assert sorted(rule.clause) == sorted("SVORPA")
        assert sorted(rule.phrase) == sorted("DQJNGC")
        assert Direction.parse(f"{rule.code}-xx").source == rule.code
        if rule.order != "SVO" and rule.code not in ("kmb", "nhl"):
            assert rule.case != "none"


def test_cognates_make_languages_alike():
    def shared(share: float) -> int:
        corpus = Babel(BabelSettings(cognates=share))
        left, right = (corpus.language(code).forms.adverb for code in ("avl", "kmb"))
        return sum(a[:2] == b[:2] for a, b in zip(left, right, strict=True))

    assert shared(1.0) > shared(0.0) + 3


# -- what is said ----------------------------------------------------------------------------------------------------


def test_gloss_reads_the_tree(babel):
    meaning = babel.meaning("test", 0)
    assert meaning.verb in babel.gloss("test", 0)
    assert meaning.subject.noun in babel.gloss("test", 0)
    cells = row(
        VERB=verb(babel, "give"),
        TENSE=2,
        NEGATIVE=1,
        SUBJECT=noun(babel, "king"),
        OBJECT=noun(babel, "book"),
        RECIPIENT=noun(babel, "mira"),
        LOCATION=noun(babel, "house"),
        ADPOSITION=2,
        ADVERB=4,
    )
    cells[m.OBJECT + m.COUNT] = 3
    cells[m.SUBJECT + m.ADJECTIVE] = 1
    expected = "not give.future(king[big], book[three], to mira, near house, tomorrow)"
    assert str(Meaning.read(cells, babel.concepts)) == expected


def test_meanings_make_sense():
    corpus = concepts()
    kinds = {n.gloss: n.kind for n in corpus.nouns}
    verbs = {v.gloss: v for v in corpus.verbs}
    adjectives = {a.gloss: a for a in corpus.adjectives}
    tenses = dict(ADVERBS)
    sampler = MeaningSampler(corpus, complexity="rich", seed=1)
    for cells in sampler.draw(np.random.default_rng(1), 3_000):
        meaning = Meaning.read(cells, corpus)
        doing = verbs[meaning.verb]
        assert kinds[meaning.subject.noun] in doing.subjects
        assert (meaning.object is not None) == bool(doing.objects)
        assert (meaning.recipient is not None) == doing.recipient
        assert meaning.object is None or kinds[meaning.object.noun] in doing.objects
        assert meaning.adverb is None or tenses[meaning.adverb] in (None, meaning.tense)
        assert meaning.place is None or kinds[meaning.place[1].noun] == "l"
        assert doing.objects or meaning.place or meaning.adverb
        for phrase in (meaning.subject, meaning.object):
            if phrase is None:
                continue
            assert all(kinds[phrase.noun] in adjectives[a].kinds for a in phrase.adjectives)
            if kinds[phrase.noun] == "m":
                assert not phrase.plural
                assert phrase == type(phrase)(phrase.noun)
            if phrase.relative is not None:
                relative, other = phrase.relative
                assert kinds[phrase.noun] in verbs[relative].subjects
                assert (other is not None) == bool(verbs[relative].objects)


def test_frequencies_fall_as_in_real_text(babel):
    rows = np.array([babel._row_block("train", 0, block) for block in range(4)]).reshape(-1, m.WIDTH)
    counts = np.bincount(rows[:, m.VERB], minlength=len(babel.concepts.verbs) + 1)[1:]
    transitive = [count for count, v in zip(counts, babel.concepts.verbs, strict=True) if v.frame == 1]
    assert transitive[0] > 3 * transitive[-1] > 0
    assert min(counts) > 10


def test_default_sentences_are_short_and_concepts_few(babel):
    assert 150 <= len(babel.concepts) <= 250
    assert len(babel.concepts) == DEFAULT_CONCEPTS
    for code in babel.languages:
        lengths = [len(sentence.split()) for sentence in babel.monolingual(code, "train")[:2_000]]
        assert 4.5 < sum(lengths) / len(lengths) < 9
        assert min(lengths) >= 3
        assert max(lengths) <= 18


@pytest.mark.parametrize("number", [MINIMUM_CONCEPTS, 100, 205, 500, 2_000])
def test_any_number_of_concepts(number):
    grown = concepts(number)
    assert len(grown) == pytest.approx(number, rel=0.05, abs=12)
    assert len({n.gloss for n in grown.nouns}) == len(grown.nouns)
    assert len({v.gloss for v in grown.verbs}) == len(grown.verbs)
