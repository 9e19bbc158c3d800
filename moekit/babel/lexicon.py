"""The words of a language: stems made from its sounds, and every inflected form of every stem.

No two different things are ever written alike: a new stem is drawn until none of its forms collides with a form that
exists. So every sentence can be read back, and translation has one right answer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moekit.babel.concepts import ADPOSITIONS, ADVERBS, DEMONSTRATIVES, NAME, NUMERALS, PERSON, Concepts, Noun
from moekit.babel.grammar import Grammar, pick, sample
from moekit.babel.words import Words

# Cases: bare (subject), object, recipient and place, possessor.
NOMINATIVE, ACCUSATIVE, DATIVE, GENITIVE = range(4)
_CASES = 4
_PATIENCE = 300


@dataclass
class Forms:
    """Every word of a language, inflected; lists are indexed by concept (from 0).

    Attributes:
        noun: ``[noun][plural][definite][case]``; those that are never said come last.
        noun_class: ``[noun]``.
        adjective: ``[adjective][class][plural][case]``.
        verb: ``[verb][class][plural][tense][negative]``, particles included.
        relative_verb: ``[verb]``, the form inside a relative clause.
        article: ``[class][plural]``, empty where there is none.
        case_particle: ``[case]``, empty where there is none.
        relativizer: the word that joins a relative clause to its noun.
        glosses: English by word, with what its form tells: ``dog.PL``, ``sleep.PAST.NOT``.
    """

    noun: list[list[list[list[str]]]] = field(default_factory=list)
    noun_class: list[int] = field(default_factory=list)
    adjective: list[list[list[list[str]]]] = field(default_factory=list)
    verb: list[list[list[list[list[str]]]]] = field(default_factory=list)
    relative_verb: list[str] = field(default_factory=list)
    numeral: list[str] = field(default_factory=list)
    demonstrative: list[str] = field(default_factory=list)
    adposition: list[str] = field(default_factory=list)
    adverb: list[str] = field(default_factory=list)
    article: list[list[str]] = field(default_factory=list)
    case_particle: list[str] = field(default_factory=list)
    relativizer: str = ""
    glosses: dict[str, str] = field(default_factory=dict)


class _ClashingAffixes(Exception):  # noqa: N818
    """The affixes drawn for a language make two forms of every stem alike."""


class _Builder:
    def __init__(self, grammar: Grammar, concepts: Concepts, seed: int, cognates: float, attempt: int) -> None:
        self.grammar, self.concepts, self.cognates, self.seed = grammar, concepts, cognates, seed
        self.words = Words(grammar, seed)
        self.owner: dict[str, str] = {}
        self.affixes: set[str] = set()
        rng = self.words.rng(f"affixes/{attempt}")
        self.buffer = pick(rng, [c for c in self.words.consonants if len(c) == 1 and c in "ynrlhwms"] or ["n"])
        self.class_affix = self._class_affixes(rng)
        self.plural_affix = self._affixes(rng, 1, prefix=grammar.number == "prefix")[0]
        self.case_ending = ["", *self._affixes(rng, 3)] if grammar.case == "suffix" else [""] * _CASES
        self.article_ending = self._affixes(rng, 1)[0]
        prefixed = grammar.tense == "prefix"
        self.tense_affix = self._affixes(rng, 3, prefix=prefixed)
        self.negative_affix = self._affixes(rng, 1, prefix=grammar.negation == "prefix")[0]
        self.verb_plural = self._affixes(rng, 1, prefix=prefixed)[0]

    def _affixes(self, rng: random.Random, number: int, *, prefix: bool = False) -> list[str]:
        vowels, codas = self.words.vowels(), [c for c in self.grammar.sounds.codas if c]
        onsets = self.words.consonants
        found: list[str] = []
        while len(found) < number:
            affix = pick(rng, onsets) + pick(rng, vowels)
            if not prefix and codas and rng.random() < 0.6:
                affix = pick(rng, vowels) + pick(rng, codas)
            if affix not in self.affixes:
                self.affixes.add(affix)
                found.append(affix)
        return found

    def _class_affixes(self, rng: random.Random) -> list[tuple[str, str]]:
        """(singular, plural) by class."""
        classes = self.grammar.noun_classes
        if classes == 1:
            return [("", "")]
        if self.grammar.class_marker == "prefix":
            affixes = self._affixes(rng, 2 * classes, prefix=True)
            return list(zip(affixes[::2], affixes[1::2], strict=True))
        endings = sample(rng, self.words.vowels(), classes)
        plural = pick(rng, [c for c in self.grammar.sounds.codas if c] or self.words.consonants)
        if "s" in self.words.consonants:
            plural = "s"
        return [(vowel, vowel + plural) for vowel in endings]

    # -- inflection ------------------------------------------------------------------------------------------------

    def _end(self, word: str, *endings: str) -> str:
        for ending in endings:
            word = self.words.attach(word, ending, self.buffer)
        return word

    def _concord(self, stem: str, noun_class: int, plural: bool) -> str:
        affix = self.class_affix[noun_class][plural]
        return affix + stem if self.grammar.class_marker == "prefix" else self._end(stem, affix)

    def noun_forms(self, stem: str, noun_class: int, name: bool) -> list[list[list[str]]]:
        grammar = self.grammar

        def form(plural: bool, definite: bool, case: int) -> str:
            word, after = stem, ""
            if not name:
                if grammar.noun_classes > 1:
                    word = self._concord(stem, noun_class, plural)
                elif plural and grammar.number == "suffix":
                    word = self._end(stem, self.plural_affix)
                elif plural and grammar.number == "prefix":
                    word = self.plural_affix + stem
                elif plural and grammar.number == "reduplication":
                    word = f"{stem}-{stem}"
                elif plural:
                    after = f" {self.plural_word}"
                if definite and grammar.article == "suffix":
                    word = self._end(word, self.article_ending)
            return self._end(word, self.case_ending[case]) + after

        return [[[form(p, d, c) for c in range(_CASES)] for d in (False, True)] for p in (False, True)]

    def adjective_forms(self, stem: str) -> list[list[list[str]]]:
        grammar = self.grammar

        def form(noun_class: int, plural: bool, case: int) -> str:
            word = stem
            if grammar.adjective_agrees and grammar.noun_classes > 1:
                word = self._concord(stem, noun_class, plural)
            elif grammar.adjective_agrees and plural and grammar.number == "prefix":
                word = self.plural_affix + stem
            elif grammar.adjective_agrees and plural:
                word = self._end(stem, self.plural_affix)
            return self._end(word, self.case_ending[case]) if grammar.adjective_case else word

        return [[[form(k, p, c) for c in range(_CASES)] for p in (False, True)] for k in range(grammar.noun_classes)]

    def verb_forms(self, stem: str) -> list[list[list[list[str]]]]:
        grammar = self.grammar

        def form(noun_class: int, plural: bool, tense: int, negative: bool) -> str:
            agreement, place = "", grammar.class_marker
            if grammar.verb_agrees == "class":
                agreement = self.class_affix[noun_class][plural]
            elif grammar.verb_agrees == "number":
                agreement = self.verb_plural if plural else ""
                place = "prefix" if grammar.tense == "prefix" else "suffix"
            agreed, timed = (agreement, place), (self.tense_affix[tense], grammar.tense)
            denied = (self.negative_affix if negative else "", grammar.negation)
            word = "".join(affix for affix, where in (denied, agreed, timed) if where == "prefix") + stem
            word = self._end(word, *(affix for affix, where in (timed, denied, agreed) if where == "suffix"))
            negative_word = self.negative_word if negative else ""
            for particle, where in ((self.tense_word[tense], grammar.tense), (negative_word, grammar.negation)):
                if particle:
                    word = f"{particle} {word}" if where == "before" else f"{word} {particle}"
            return word

        return [
            [[[form(k, p, t, n) for n in (False, True)] for t in range(3)] for p in (False, True)]
            for k in range(grammar.noun_classes)
        ]

    # -- drawing words ---------------------------------------------------------------------------------------------

    def _claim(self, key: str, forms: Callable[[str], Iterable[tuple[str, str]]], stems: Iterable[str]) -> str:
        """The first of `stems` of which no form is taken; the forms are then `key`'s.

        `forms(stem)` gives (written form, what it tells beyond `key`); within one stem, two forms that tell different
        things must differ too.

        Raises:
            _ClashingAffixes: if no stem will do, because the affixes themselves are ambiguous.
        """
        for stem in itertools.islice(stems, _PATIENCE):
            mine: dict[str, str] = {}
            for form, tells in forms(stem):
                owner = f"{key}/{tells}"
                if self.owner.get(form, owner) != owner or mine.get(form, owner) != owner:
                    break
                mine[form] = owner
            else:
                self.owner.update(mine)
                return stem
        raise _ClashingAffixes(key)

    def _stems(
        self, key: str, syllables: int, *, closed: bool = False, shared: str = "", alike: bool = True
    ) -> Iterable[str]:
        """Stems for `key`; first, where it is `alike` in all languages, that of the international word."""
        shared_rng = random.Random(f"babel/{self.seed}/international/{key}")
        if shared:
            yield self.words.adapt(shared, closed=closed)
        elif alike and shared_rng.random() < self.cognates:
            sounds = "ptkbdgmnlrsvf"
            root = "".join(pick(shared_rng, sounds) + pick(shared_rng, "aeiou") for _ in range(2))
            yield self.words.adapt(root + pick(shared_rng, "nlrs"), closed=closed)
        rng = self.words.rng(key)
        tries = 0
        while True:
            # A crowded lexicon gets longer words.
            yield self.words.stem(rng, syllables + tries // 30, closed=closed)
            tries += 1

    def particle(self, key: str, syllables: int = 1) -> str:
        return self._claim(key, lambda stem: [(stem, "")], self._stems(key, syllables))

    def build(self) -> Forms:
        grammar, concepts, forms = self.grammar, self.concepts, Forms()
        plural_word = grammar.noun_classes == 1 and grammar.number == "particle"
        self.plural_word = self.particle("plural") if plural_word else ""
        self.negative_word = self.particle("not") if grammar.negation in ("before", "after") else ""
        self.tense_word = ["", "", ""]
        if grammar.tense in ("before", "after"):
            self.tense_word = [self.particle("past"), "", self.particle("future")]
        forms.relativizer = self.particle("that")
        forms.case_particle = [""] * _CASES
        if grammar.case == "particle":
            forms.case_particle = ["", self.particle("acc"), self.particle("dat"), self.particle("gen")]
        elif grammar.case == "none":
            forms.case_particle = ["", "", self.particle("dat"), self.particle("gen")]
        if grammar.article == "word":
            forms.article = [[self.particle(f"article{k}{p}") for p in range(2)] for k in range(grammar.noun_classes)]
        forms.demonstrative = [self.particle(f"dem/{gloss}") for gloss in DEMONSTRATIVES]
        forms.adposition = [self.particle(f"adp/{gloss}", 1 + i // 5) for i, gloss in enumerate(ADPOSITIONS)]
        forms.numeral = [self.particle(f"num/{gloss}") for gloss in NUMERALS]
        forms.adverb = [self.particle(f"adv/{gloss}", 2) for gloss, _ in ADVERBS]
        self._build_nouns(forms, concepts.nouns)
        self._build_verbs(forms)
        closed = grammar.noun_classes > 1 and grammar.class_marker == "suffix" and grammar.adjective_agrees
        for rank, adjective in enumerate(concepts.adjectives):
            key = f"adj/{adjective.gloss}"
            stems = self._stems(key, 1 + (rank > 5), closed=closed)
            stem = self._claim(key, lambda s: ((form, "") for form in _leaves(self.adjective_forms(s))), stems)
            forms.adjective.append(self.adjective_forms(stem))
        self._build_nouns(forms, concepts.unsaid, alike=False)  # last, so that all that is said is as without them
        forms.glosses = {word: _gloss(*owner.split("/")) for word, owner in self.owner.items()}
        return forms

    def _build_nouns(self, forms: Forms, nouns: Iterable[Noun], *, alike: bool = True) -> None:
        grammar = self.grammar
        suffixed = grammar.noun_classes > 1 and grammar.class_marker == "suffix"
        ranks: dict[str, int] = {}
        for noun in nouns:
            rank = ranks[noun.kind] = ranks.get(noun.kind, -1) + 1
            key, name = f"noun/{noun.gloss}", noun.kind == NAME
            if grammar.class_marker == "prefix":
                noun_class = 0 if noun.kind in (PERSON, NAME) else 1 + "aftl".index(noun.kind) // 2
                noun_class = min(noun_class, grammar.noun_classes - 1)
            else:
                noun_class = int(self.words.rng(f"class/{key}").random() * grammar.noun_classes)
            tell = functools.partial(self._noun_tells, noun_class=noun_class, name=name)
            shared = noun.gloss if name and noun.gloss.isalpha() else ""
            stems = self._stems(
                key, 1 + (rank > 3 or not alike), closed=suffixed and not name, shared=shared, alike=alike
            )
            forms.noun.append(self.noun_forms(self._claim(key, tell, stems), noun_class, name))
            forms.noun_class.append(noun_class)

    def _noun_tells(self, stem: str, noun_class: int, name: bool) -> Iterator[tuple[str, str]]:
        for plural, by_number in enumerate(self.noun_forms(stem, noun_class, name)):
            number = "" if name or self.plural_word else plural
            for by_case in by_number:
                for form, ending in zip(by_case, self.case_ending, strict=True):
                    yield form.split(" ")[0], f"{number}/{ending}"

    def _build_verbs(self, forms: Forms) -> None:
        for rank, verb in enumerate(self.concepts.verbs):
            key = f"verb/{verb.gloss}"
            stem = self._claim(key, self._verb_tells, self._stems(key, 1 + (rank % 14 > 3)))
            forms.verb.append(self.verb_forms(stem))
            forms.relative_verb.append(stem)

    def _verb_tells(self, stem: str) -> Iterator[tuple[str, str]]:
        particles = {*self.tense_word, self.negative_word}
        timed, denied = (how in ("prefix", "suffix") for how in (self.grammar.tense, self.grammar.negation))
        turns = itertools.cycle(itertools.product(range(3), range(2)))
        for form, (tense, negative) in zip(_leaves(self.verb_forms(stem)), turns, strict=False):
            word = next((w for w in form.split(" ") if w not in particles), form)
            yield word, f"{tense if timed else ''}/{negative if denied else ''}"
        # A stem in a relative clause stands bare, and counts as said without tense.
        if timed:
            yield stem, "relative"


_PARTICLES = {"that": "that", "plural": "PL", "not": "NOT", "past": "PAST", "future": "FUT", "acc": "ACC", "dat": "to",
              "gen": "of"}  # fmt: skip


def _gloss(kind: str, *told: str) -> str:
    """English for the owner of a word, as `_Builder._claim` names it."""
    if kind.startswith("article"):
        return "the"
    if kind in _PARTICLES:
        return _PARTICLES[kind]
    gloss, *more = told
    if kind == "noun":
        return f"{gloss}.PL" if more[0] == "1" else gloss
    if kind == "verb" and more[0] != "relative":
        marks = {"0": ".PAST", "2": ".FUT"}.get(more[0], ""), ".NOT" if more[1] == "1" else ""
        return gloss + "".join(marks)
    return gloss


def _leaves(table: Iterable[Any]) -> Iterator[str]:
    """The words of nested lists, in order."""
    for entry in table:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _leaves(entry)


@functools.lru_cache(maxsize=32)  # a run opens its corpus for training, for its test and to gloss samples
def build_forms(grammar: Grammar, concepts: Concepts, *, seed: int = 0, cognates: float = 0.15) -> Forms:
    """All words of a language; whoever asks again gets the same object, which nobody changes.

    Args:
        grammar: its rules and sounds.
        concepts: what needs a word.
        seed: other seeds give other words.
        cognates: share of the concepts whose word is an international one, pronounced in each language's way. Names
            always are, and nouns that are never said never.
    """
    for attempt in range(_PATIENCE):
        with contextlib.suppress(_ClashingAffixes):
            return _Builder(grammar, concepts, seed, cognates, attempt).build()
    raise ValueError(f"babel: the sounds of {grammar.name} must allow unambiguous affixes: found none. Add sounds.")
