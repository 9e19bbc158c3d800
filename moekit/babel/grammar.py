"""How languages differ: a grammar as plain data, eight hand-made ones, and any number drawn at random.

Word order is written out as a string of letters, so that it can be read off:

    clause  S subject, V verb, O object, R recipient, P place, A adverb
    phrase  D demonstrative or article, Q numeral, J adjectives, N noun, G possessor, C relative clause

Every grammar marks, somehow, all that a meaning holds (number, tense, polarity, who does what to whom), or can leave it
to context; so a translation is never a guess. Articles and noun classes follow from the noun and add nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Phonology:
    """The sounds of a language: onsets and codas by falling frequency (`""` = none), and vowels.

    `harmony` pairs back with front vowels: a word holds vowels of one side only, and so do its endings.
    """

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...] = ("",)
    harmony: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Grammar:
    """One language's rules.

    Attributes:
        code, name: what the language is called.
        clause, phrase: word order, see the module.
        prepositions: adpositions stand before their phrase, else after it.
        case: how object, recipient, possessor and place are marked: endings on the noun, particles after the phrase, or
            only by order (and a particle for recipient and possessor).
        noun_classes: 1 = none. Classes are marked by an affix on the noun that fuses class and number.
        class_marker: where that affix stands.
        number: how the plural is marked where there are no classes.
        plural_after_numeral: three dogs, or three dog.
        article: none, a word before that agrees in class and number, or an ending of the noun.
        adjective_agrees: with the class and number (or number alone) of the noun.
        adjective_case: adjectives take the case ending too.
        verb_agrees: the verb shows the subject's number, or class and number.
        tense: an ending, a prefix, or a particle.
        negation: a particle, or an affix of the verb.
    """

    code: str
    name: str
    sounds: Phonology
    clause: str
    phrase: str
    prepositions: bool = True
    case: Literal["none", "suffix", "particle"] = "none"
    noun_classes: int = 1
    class_marker: Literal["prefix", "suffix"] = "suffix"
    number: Literal["suffix", "prefix", "particle", "reduplication"] = "suffix"
    plural_after_numeral: bool = True
    article: Literal["none", "word", "suffix"] = "none"
    adjective_agrees: bool = False
    adjective_case: bool = False
    verb_agrees: Literal["no", "number", "class"] = "no"
    tense: Literal["suffix", "prefix", "before", "after"] = "suffix"
    negation: Literal["before", "after", "prefix", "suffix"] = "before"

    @property
    def order(self) -> str:
        """The letters S, V, O as they stand in a clause, for example SOV."""
        return "".join(letter for letter in self.clause if letter in "SVO")


def _sounds(onsets: str, vowels: str, codas: str = "-", harmony: str = "") -> Phonology:
    """Sounds from lists parted by spaces, where "-" stands for none, and pairs of back and front vowels."""

    def heard(listed: str) -> tuple[str, ...]:
        return tuple("" if sound == "-" else sound for sound in listed.split())

    pairs = tuple((pair[0], pair[1]) for pair in harmony.split())
    return Phonology(heard(onsets), heard(vowels), heard(codas), pairs)


_HANDMADE = (
    Grammar(
        "avl",
        "Avelin",
        _sounds("l v r m t s n d c b p f br fl tr -", "a e i o", "- - n l r"),
        clause="SVORPA",
        phrase="DQJNGC",
        noun_classes=2,
        article="word",
        adjective_agrees=True,
        verb_agrees="number",
    ),
    Grammar(
        "tnd",
        "Tündrak",
        _sounds("k t y d g b s r l n m ç ş", "a o u e ö ü", "- - k r l n z", harmony="ae oö uü"),
        clause="SAPROV",
        phrase="CGDQJN",
        prepositions=False,
        case="suffix",
        plural_after_numeral=False,
        verb_agrees="number",
        negation="suffix",
    ),
    Grammar(
        "kmb",
        "Kimbazi",
        _sounds("mb nd k z w l t s b y ng h", "a e i o u"),
        clause="VSORPA",
        phrase="NJQDGC",
        noun_classes=3,
        class_marker="prefix",
        adjective_agrees=True,
        verb_agrees="class",
        tense="prefix",
        negation="prefix",
    ),
    Grammar(
        "shl",
        "Shailo",
        _sounds("sh x zh l q h m n f d g t", "ai ao u i ei o ia", "- - ng n"),
        clause="ASPVRO",
        phrase="CGDQJN",
        number="particle",
        plural_after_numeral=False,
        tense="after",
    ),
    Grammar(
        "vrs",
        "Vroska",
        _sounds("vr sk p d st k m z b n l č t zd", "a o e i y", "- - k l n sh t"),
        clause="APSVRO",
        phrase="DQJNGC",
        case="suffix",
        noun_classes=3,
        adjective_agrees=True,
        adjective_case=True,
        verb_agrees="class",
        negation="prefix",
    ),
    Grammar(
        "nhl",
        "Norhal",
        _sounds("h n gr v s b t k f l m r sv", "a e i å ø u", "- l n r d rd"),
        clause="PVSROA",
        phrase="DQJNCG",
        article="suffix",
        adjective_agrees=True,
        negation="after",
    ),
    Grammar(
        "ori",
        "Oronai",
        _sounds("h k l m n p w r -", "a e i o u ā ō"),
        clause="VORSPA",
        phrase="QNJDGC",
        case="particle",
        number="reduplication",
        plural_after_numeral=False,
        tense="before",
    ),
    Grammar(
        "tsq",
        "Tsaqil",
        _sounds("ts q t' k' l s x m n y ch", "a i u", "- l q s n"),
        clause="AORPVS",
        phrase="DNJQGC",
        prepositions=False,
        case="suffix",
        number="prefix",
        verb_agrees="number",
        tense="prefix",
        negation="suffix",
    ),
)


def grammars(number: int, seed: int = 0) -> tuple[Grammar, ...]:
    """The first `number` languages: eight hand-made ones, then drawn ones."""
    made = list(_HANDMADE[:number])
    taken = {grammar.code for grammar in made}
    for index in range(len(made), number):
        made.append(_draw(random.Random(f"grammar/{seed}/{index}"), taken))
        taken.add(made[-1].code)
    return tuple(made)


def pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    """One of `choices`; uses `random()` alone, whose stream Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


def sample(rng: random.Random, choices: Sequence[_T], number: int) -> list[_T]:
    """`number` different ones of `choices`, in random order."""
    left = list(choices)
    return [left.pop(int(rng.random() * len(left))) for _ in range(min(number, len(left)))]


_DRAWN = _sounds(
    "p b t d k g m n l r s v f z h w y j ch sh th kr pl st tr ny gw dr", "e i o u é ô ai ou y", "n l r s k m t th"
)
_CLAUSES = ("SVORPA", "ASVROP", "SAPROV", "PSORAV", "VSORPA", "AVSROP", "VORSPA", "AORPVS", "SVROAP", "APSROV")


def _draw(rng: random.Random, taken: set[str]) -> Grammar:
    """A random language whose word order and adpositions go together as they tend to in the world."""
    onsets = (*sample(rng, _DRAWN.onsets, 10 + int(rng.random() * 4)),)
    vowels = ("a", *sample(rng, _DRAWN.vowels, 3 + int(rng.random() * 3)))
    codas = ("", "", *sample(rng, _DRAWN.codas, int(rng.random() * 5)))
    clause = pick(rng, _CLAUSES)
    verb_final = clause.index("V") > clause.index("O")
    head_final = verb_final if rng.random() < 0.85 else not verb_final
    phrase = pick(rng, ("CGDQJN", "GCQDJN") if head_final else ("DQJNGC", "NJQDGC", "DNJQGC", "QNJDGC"))
    # A verb-final or object-first clause puts bare phrases side by side and cannot do without case.
    middle = "".join(letter for letter in clause if letter in "SVO") == "SVO"
    case: Literal["none", "suffix", "particle"] = pick(rng, ("none", "suffix", "particle"))
    if not middle and case == "none":
        case = pick(rng, ("suffix", "particle"))
    classes = pick(rng, (1, 1, 2, 3))
    agrees: Literal["no", "number", "class"] = pick(rng, ("no", "number", "class"))
    while True:
        name = pick(rng, onsets) + pick(rng, vowels) + pick(rng, onsets) + pick(rng, vowels)
        name += pick(rng, ("n", "l", "ri", "sh", "ka", "m"))
        letters = [letter for letter in name if letter.isascii() and letter.isalpha()]
        code = letters[0] + "".join(sample(rng, letters[1:], 2))
        if len(code) == 3 and code not in taken:
            break
    return Grammar(
        code,
        name.capitalize(),
        Phonology(onsets, vowels, codas),
        clause,
        phrase,
        prepositions=not head_final,
        case=case,
        noun_classes=classes,
        class_marker=pick(rng, ("prefix", "suffix")),
        number=pick(rng, ("suffix", "prefix", "particle", "reduplication")),
        plural_after_numeral=rng.random() < 0.5,
        article=pick(rng, ("none", "word", "suffix")) if classes > 1 else pick(rng, ("none", "none", "suffix")),
        adjective_agrees=rng.random() < 0.5,
        adjective_case=rng.random() < 0.3,
        verb_agrees="number" if classes == 1 and agrees == "class" else agrees,
        tense=pick(rng, ("suffix", "prefix", "before", "after")),
        negation=pick(rng, ("before", "after", "prefix", "suffix")),
    )
