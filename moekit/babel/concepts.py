"""What can be talked about: the concepts of babel, with English glosses, and which of them go together.

Open classes (nouns, verbs, adjectives) grow and shrink with the wanted number of concepts; closed ones (numerals,
demonstratives, adpositions, adverbs) stay. Every noun belongs to a kind; verbs say which kinds can be their subject and
their object, adjectives which kinds they describe. So a sentence is never nonsense, and a masked word can be guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

PERSON, NAME, ANIMAL, FOOD, THING, PLACE = "p", "m", "a", "f", "t", "l"
TENSES = ("past", "present", "future")
NUMERALS = ("two", "three", "four", "five", "seven")
DEMONSTRATIVES = ("this", "that")
ADPOSITIONS = ("in", "near", "behind", "under", "beside", "from", "toward", "beyond")
# Adverbs of time go with one tense, the others with any.
ADVERBS = (
    ("today", None),
    ("yesterday", "past"),
    ("now", "present"),
    ("tomorrow", "future"),
    ("slowly", None),
    ("often", None),
    ("soon", "future"),
    ("quietly", None),
    ("once", "past"),
    ("quickly", None),
    ("always", "present"),
    ("gladly", None),
)

# Most frequent first within each kind.
_NOUNS = {
    PERSON: "child woman man farmer teacher king friend doctor queen baker sailor hunter merchant singer student "
    "soldier thief weaver",
    NAME: "mira tomas anika oren salome davi lena kofi",
    ANIMAL: "dog cat horse bird fish cow wolf goat bear mouse owl fox snake bee frog hare lion turtle",
    FOOD: "bread apple soup rice honey cheese egg cake pear onion salt bean fig nut",
    THING: "book lamp letter key rope knife boat basket coin hat bell cup drum ring chair mirror ladder needle map "
    "candle blanket hammer shoe bottle",
    PLACE: "house river market mountain village forest garden road bridge lake island field tower cave harbour "
    "temple school desert",
}
_ANIMATE = PERSON + NAME + ANIMAL
_ANYTHING = _ANIMATE + FOOD + THING + PLACE
_INTRANSITIVES = (
    ("sleep", _ANIMATE),
    ("walk", _ANIMATE),
    ("laugh", PERSON + NAME),
    ("wait", _ANIMATE),
    ("sing", PERSON + NAME),
    ("run", _ANIMATE),
    ("work", PERSON + NAME),
    ("fall", _ANIMATE + FOOD + THING),
    ("dance", PERSON + NAME),
    ("swim", _ANIMATE),
    ("rest", _ANIMATE),
    ("shout", PERSON + NAME),
    ("cry", PERSON + NAME),
    ("shine", THING),
)
_TRANSITIVES = (
    ("see", _ANIMATE, _ANYTHING),
    ("find", _ANIMATE, _ANYTHING),
    ("eat", _ANIMATE, FOOD),
    ("love", PERSON + NAME, _ANYTHING),
    ("carry", PERSON + NAME, FOOD + THING + ANIMAL),
    ("know", PERSON + NAME, PERSON + NAME + PLACE),
    ("follow", _ANIMATE, _ANIMATE),
    ("buy", PERSON + NAME, FOOD + THING + ANIMAL),
    ("help", PERSON + NAME, PERSON + NAME + ANIMAL),
    ("hear", _ANIMATE, _ANIMATE),
    ("fear", _ANIMATE, _ANIMATE),
    ("lose", PERSON + NAME, THING),
    ("cook", PERSON + NAME, FOOD),
    ("hide", PERSON + NAME, FOOD + THING),
    ("call", PERSON + NAME, _ANIMATE),
    ("break", PERSON + NAME, THING),
    ("visit", PERSON + NAME, PERSON + NAME + PLACE),
    ("chase", ANIMAL, PERSON + ANIMAL),
    ("wash", PERSON + NAME, THING + ANIMAL),
    ("greet", PERSON + NAME, PERSON + NAME),
    ("taste", _ANIMATE, FOOD),
    ("repair", PERSON + NAME, THING),
    ("paint", PERSON + NAME, THING + PLACE),
    ("leave", _ANIMATE, PLACE),
    ("guard", PERSON + ANIMAL, PLACE + THING),
    ("wake", PERSON + NAME, PERSON + NAME + ANIMAL),
)
_DITRANSITIVES = (
    ("give", PERSON + NAME, FOOD + THING + ANIMAL),
    ("show", PERSON + NAME, THING + PLACE + ANIMAL),
    ("bring", PERSON + NAME, FOOD + THING),
    ("sell", PERSON + NAME, FOOD + THING + ANIMAL),
    ("send", PERSON + NAME, FOOD + THING),
    ("lend", PERSON + NAME, THING),
    ("promise", PERSON + NAME, FOOD + THING + ANIMAL),
    ("throw", PERSON + NAME, FOOD + THING),
)
_ADJECTIVES = (
    ("big", PERSON + ANIMAL + FOOD + THING + PLACE),
    ("small", PERSON + ANIMAL + FOOD + THING + PLACE),
    ("old", PERSON + ANIMAL + THING + PLACE),
    ("new", FOOD + THING + PLACE),
    ("good", PERSON + ANIMAL + FOOD + THING),
    ("red", ANIMAL + FOOD + THING),
    ("young", PERSON + ANIMAL),
    ("white", ANIMAL + FOOD + THING + PLACE),
    ("beautiful", PERSON + ANIMAL + THING + PLACE),
    ("happy", PERSON + ANIMAL),
    ("black", ANIMAL + FOOD + THING),
    ("hungry", PERSON + ANIMAL),
    ("dark", THING + PLACE),
    ("strange", PERSON + ANIMAL + FOOD + THING + PLACE),
    ("heavy", FOOD + THING),
    ("fresh", FOOD),
    ("tired", PERSON + ANIMAL),
    ("green", ANIMAL + FOOD + THING + PLACE),
    ("sweet", FOOD),
    ("quiet", PERSON + ANIMAL + PLACE),
    ("kind", PERSON),
    ("blue", ANIMAL + THING),
    ("broken", THING),
    ("clever", PERSON + ANIMAL),
    ("brave", PERSON + ANIMAL),
    ("warm", FOOD + THING + PLACE),
    ("empty", THING + PLACE),
    ("bitter", FOOD),
    ("distant", PLACE),
    ("yellow", ANIMAL + FOOD + THING),
)


@dataclass(frozen=True)
class Noun:
    """Something: an English gloss and its kind."""

    gloss: str
    kind: str


@dataclass(frozen=True)
class Verb:
    """Something done: which kinds do it, to which kinds (empty: intransitive), and whether it has a recipient."""

    gloss: str
    subjects: str
    objects: str = ""
    recipient: bool = False

    @property
    def frame(self) -> int:
        """0 intransitive, 1 transitive, 2 ditransitive."""
        return 2 if self.recipient else 1 if self.objects else 0


@dataclass(frozen=True)
class Adjective:
    """A quality and the kinds of noun that can have it."""

    gloss: str
    kinds: str


@dataclass(frozen=True)
class Concepts:
    """The open classes, most frequent first within noun kinds and verb frames.

    Attributes:
        nouns, verbs, adjectives: what text is about.
        unsaid: nouns that have a word in every language and are in no text; they are counted behind `nouns`.
    """

    nouns: tuple[Noun, ...]
    verbs: tuple[Verb, ...]
    adjectives: tuple[Adjective, ...]
    unsaid: tuple[Noun, ...] = ()

    def __len__(self) -> int:
        return len(self.nouns) + len(self.verbs) + len(self.adjectives) + _CLOSED


_Entry = TypeVar("_Entry", Noun, Verb, Adjective)
_OPEN = sum(len(words.split()) for words in _NOUNS.values()) + sum(
    map(len, (_INTRANSITIVES, _TRANSITIVES, _DITRANSITIVES, _ADJECTIVES))
)
_CLOSED = len(NUMERALS) + len(DEMONSTRATIVES) + len(ADPOSITIONS) + len(ADVERBS)
DEFAULT_CONCEPTS = _OPEN + _CLOSED
MINIMUM_CONCEPTS = _CLOSED + 20


def concepts(number: int = DEFAULT_CONCEPTS, unsaid: int = 0) -> Concepts:
    """About `number` concepts: every open class cut or extended in proportion.

    Past the hand-written ones, concepts get numbered glosses (``animal19``) and take the kinds of the hand-written
    ones in turn.

    Args:
        number: how many, the unsaid ones not counted.
        unsaid: nouns of each kind but names that no text has.

    Raises:
        ValueError: if `number` is below `MINIMUM_CONCEPTS`.
    """
    if number < MINIMUM_CONCEPTS:
        raise ValueError(f"babel needs at least {MINIMUM_CONCEPTS} concepts: got {number}.")
    scale = (number - _CLOSED) / _OPEN

    def grow(base: Sequence[_Entry], name: str) -> list[_Entry]:
        return [
            base[i] if i < len(base) else dataclasses.replace(base[i % len(base)], gloss=f"{name}{i + 1}")
            for i in range(max(2, round(len(base) * scale)))
        ]

    names = {PERSON: "person", NAME: "name", ANIMAL: "animal", FOOD: "food", THING: "thing", PLACE: "place"}
    nouns: list[Noun] = []
    for kind, glosses in _NOUNS.items():
        nouns += grow([Noun(gloss, kind) for gloss in glosses.split()], names[kind])
    verbs = grow([Verb(*entry) for entry in _INTRANSITIVES], "act")
    verbs += grow([Verb(*entry) for entry in _TRANSITIVES], "affect")
    verbs += grow([Verb(*entry, recipient=True) for entry in _DITRANSITIVES], "transfer")
    adjectives = grow([Adjective(*entry) for entry in _ADJECTIVES], "quality")
    kept = [Noun(f"unsaid-{names[kind]}{i + 1}", kind) for kind in _NOUNS if kind != NAME for i in range(unsaid)]
    return Concepts(tuple(nouns), tuple(verbs), tuple(adjectives), tuple(kept))
