"""Meanings: small trees of concepts, drawn at random, and the same as rows of integers.

A meaning is one clause: a verb with tense and polarity, its participants, maybe a place and an adverb. Sampling works
on blocks of rows in numpy (a sentence costs microseconds); `Meaning.read` turns a row into the tree, for people and
for probing.

Train, validation and test meanings are disjoint by construction: a row belongs to the split that its hash says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moekit.babel.concepts import (
    ADPOSITIONS,
    ADVERBS,
    DEMONSTRATIVES,
    NAME,
    NUMERALS,
    PERSON,
    PLACE,
    TENSES,
    Concepts,
)
from moekit.errors import UserError
from moekit.source import SPLITS, Split

Rows = npt.NDArray[np.int64]
Complexity = Literal["plain", "rich"]

# Columns of a row. A participant is PHRASE consecutive columns; ids count from 1, 0 = absent.
VERB, TENSE, NEGATIVE, ADVERB, ADPOSITION, PARTICIPANTS = 0, 1, 2, 3, 4, 5
NOUN, COUNT, DEMONSTRATIVE, ADJECTIVE, ADJECTIVE_2, POSSESSOR, POSSESSOR_PLURAL = range(7)
RELATIVE, RELATIVE_OBJECT, RELATIVE_PLURAL = 7, 8, 9
PHRASE = 10
SUBJECT, OBJECT, RECIPIENT, LOCATION = (PARTICIPANTS + i * PHRASE for i in range(4))
WIDTH = PARTICIPANTS + 4 * PHRASE
# COUNT: 0 singular, 1 plural, 2 and up a numeral.
_BUCKETS = 50
# Meanings drawn at a time, and draws without anything new before giving up.
_DRAW, _PATIENCE = 1280, 40
_HELD_OUT = {"valid": 0, "test": 1}


@dataclass(frozen=True)
class Rates:
    """How often what occurs; the settings `plain` and `rich` differ in nothing else."""

    frames: tuple[float, float, float] = (0.25, 0.55, 0.20)
    negative: float = 0.12
    adverb: float = 0.4
    place: float = 0.35
    plural: float = 0.25
    numeral: float = 0.12
    demonstrative: float = 0.12
    adjective: float = 0.4
    adjective_2: float = 0.0
    possessor: float = 0.0
    relative: float = 0.0
    zipf: float = 1.0


RATES: dict[Complexity, Rates] = {
    "plain": Rates(),
    "rich": Rates(
        frames=(0.2, 0.5, 0.3),
        place=0.5,
        adverb=0.5,
        adjective=0.5,
        adjective_2=0.3,
        possessor=0.2,
        relative=0.3,
    ),
}


@dataclass(frozen=True)
class Phrase:
    """A participant: a noun and all that is said of it; glosses, not words of any language."""

    noun: str
    plural: bool = False
    numeral: str | None = None
    demonstrative: str | None = None
    adjectives: tuple[str, ...] = ()
    possessor: Phrase | None = None
    relative: tuple[str, Phrase | None] | None = None

    def __str__(self) -> str:
        marks = [m for m in (self.demonstrative, self.numeral, *self.adjectives) if m is not None]
        if self.plural and self.numeral is None:
            marks.insert(0, "plural")
        if self.possessor is not None:
            marks.append(f"of {self.possessor}")
        if self.relative is not None:
            verb, other = self.relative
            marks.append(f"that {verb}" + (f" {other}" if other is not None else ""))
        return self.noun + (f"[{', '.join(marks)}]" if marks else "")


@dataclass(frozen=True)
class Meaning:
    """What a sentence says, in concepts: the truth behind all its translations."""

    verb: str
    tense: str
    negative: bool
    subject: Phrase
    object: Phrase | None = None
    recipient: Phrase | None = None
    place: tuple[str, Phrase] | None = None
    adverb: str | None = None

    def __str__(self) -> str:
        recipient = f"to {self.recipient}" if self.recipient else None
        place = "{} {}".format(*self.place) if self.place else None
        parts = filter(None, (self.subject, self.object, recipient, place, self.adverb))
        return f"{'not ' if self.negative else ''}{self.verb}.{self.tense}({', '.join(map(str, parts))})"

    @classmethod
    def read(cls, row: Rows | list[int], concepts: Concepts) -> Meaning:
        """The tree of a row."""
        cells = [int(cell) for cell in row]

        def bare(noun: int, plural: int) -> Phrase | None:
            return Phrase(concepts.nouns[noun - 1].gloss, bool(plural)) if noun else None

        def phrase(start: int) -> Phrase | None:
            c = cells[start : start + PHRASE]
            if not c[NOUN]:
                return None
            verb, other = c[RELATIVE], bare(c[RELATIVE_OBJECT], c[RELATIVE_PLURAL])
            return Phrase(
                noun=concepts.nouns[c[NOUN] - 1].gloss,
                plural=c[COUNT] > 0,
                numeral=NUMERALS[c[COUNT] - 2] if c[COUNT] > 1 else None,
                demonstrative=DEMONSTRATIVES[c[DEMONSTRATIVE] - 1] if c[DEMONSTRATIVE] else None,
                adjectives=tuple(concepts.adjectives[a - 1].gloss for a in c[ADJECTIVE : ADJECTIVE_2 + 1] if a),
                possessor=bare(c[POSSESSOR], c[POSSESSOR_PLURAL]),
                relative=(concepts.verbs[verb - 1].gloss, other) if verb else None,
            )

        subject, place = phrase(SUBJECT), phrase(LOCATION)
        assert subject is not None
        return cls(
            verb=concepts.verbs[cells[VERB] - 1].gloss,
            tense=TENSES[cells[TENSE]],
            negative=bool(cells[NEGATIVE]),
            subject=subject,
            object=phrase(OBJECT),
            recipient=phrase(RECIPIENT),
            place=(ADPOSITIONS[cells[ADPOSITION] - 1], place) if place is not None else None,
            adverb=ADVERBS[cells[ADVERB] - 1][0] if cells[ADVERB] else None,
        )


class _Choice:
    """Many weighted choices among the same items: `draw(row, uniform)` picks an item (from 1; 0 if none has weight)."""

    def __init__(self, weights: Sequence[npt.NDArray[Any]]) -> None:
        table = np.asarray(weights, dtype=np.float64)
        total = table.sum(axis=1, keepdims=True)
        self._empty = total[:, 0] == 0
        steps = np.cumsum(table / np.where(total == 0, 1.0, total), axis=1)
        # The last item with weight ends at exactly 1, so that no rounding can choose an item without weight.
        steps = np.where(steps >= steps[:, -1:], 1.0, steps)
        self._width = table.shape[1]
        self._steps = (steps + np.arange(len(table))[:, None]).ravel()

    def draw(self, row: Rows, uniform: npt.NDArray[np.float64]) -> Rows:
        place = np.searchsorted(self._steps, row + np.minimum(uniform, 1 - 1e-9), side="right")
        item = np.clip(place - row * self._width, 0, self._width - 1)
        return np.where(self._empty[row], 0, item + 1)


class MeaningSampler:
    """Draws blocks of meanings: `block(split, number, size)` is a pure function of the settings and its arguments."""

    def __init__(self, concepts: Concepts, *, complexity: Complexity = "plain", seed: int = 0) -> None:
        self.concepts = concepts
        self.rates = RATES[complexity]
        self.seed = seed
        nouns, verbs, adjectives = concepts.nouns, concepts.verbs, concepts.adjectives
        zipf = self.rates.zipf
        noun_weight = _by_rank([noun.kind for noun in nouns], zipf)
        verb_weight = _by_rank([verb.frame for verb in verbs], zipf)
        adjective_weight = _by_rank([None for _ in adjectives], zipf)

        def kinds(allowed: str) -> npt.NDArray[np.float64]:
            return noun_weight * [noun.kind in allowed for noun in nouns]

        self._verb = _Choice([verb_weight * [verb.frame == frame for verb in verbs] for frame in range(3)])
        # Row 0 of each table stands for "no verb" or "no noun": nothing is drawn.
        none = 0.0 * noun_weight
        self._subject = _Choice([none, *(kinds(verb.subjects) for verb in verbs)])
        self._object = _Choice([none, *(kinds(verb.objects) for verb in verbs)])
        self._person = _Choice([kinds(PERSON + NAME)])
        self._place = _Choice([kinds(PLACE)])
        described = [adjective_weight * [noun.kind in a.kinds for a in adjectives] for noun in nouns]
        self._adjective = _Choice([0.0 * adjective_weight, *described])
        doing = [verb_weight * [v.frame < 2 and noun.kind in v.subjects for v in verbs] for noun in nouns]
        self._relative = _Choice([0.0 * verb_weight, *doing])
        self._adverb = _Choice([np.array([only in (None, tense) for _, only in ADVERBS]) for tense in TENSES])
        self._is_name = np.array([False, *(noun.kind == NAME for noun in nouns)])

    def block(self, split: Split, number: int, size: int, stream: int = 0) -> Rows:
        """`size` meanings of `split`, all of them different from every meaning of the other splits.

        `stream` tells apart what is drawn for different uses of one split (parallel and monolingual text). Held-out
        blocks hold no meaning twice.
        """
        generator = np.random.default_rng([self.seed, SPLITS.index(split), stream, number])
        kept: Rows = np.empty((0, WIDTH), dtype=np.int64)
        barren = 0
        while len(kept) < size:
            candidates = self.draw(generator, _DRAW)
            rows = np.concatenate([kept, candidates[split_of(candidates) == split]])
            if split != "train":
                rows = _first_of_each(rows)
            barren = 0 if len(rows) > len(kept) else barren + 1
            if barren == _PATIENCE:
                raise UserError(
                    f"babel: {split} sentences must be fewer than the different meanings that the concepts allow: got "
                    f"{size} wanted, {len(kept)} found. Ask for fewer sentences or for more concepts."
                )
            kept = rows
        return kept[:size]

    def draw(self, generator: np.random.Generator, size: int) -> Rows:
        """`size` meanings of any split."""
        rates = self.rates
        rows: Rows = np.zeros((size, WIDTH), dtype=np.int64)
        frames = np.cumsum(rates.frames)
        # Only `random` is drawn from: the streams of the other methods may change between numpy versions.
        u = generator.random((12, size))
        frame = np.minimum(np.searchsorted(frames / frames[-1], u[0], side="right"), 2)
        verb = rows[:, VERB] = self._verb.draw(frame, u[1])
        tense = rows[:, TENSE] = (u[2] * len(TENSES)).astype(np.int64)
        rows[:, NEGATIVE] = u[3] < rates.negative
        has_adverb = u[4] < rates.adverb
        rows[:, ADVERB] = np.where(has_adverb, self._adverb.draw(tense, u[5]), 0)
        # An intransitive clause gets a place or an adverb, else it would be too short to be worth translating.
        has_place = (u[6] < rates.place) | ((frame == 0) & ~has_adverb)
        rows[:, ADPOSITION] = np.where(has_place, 1 + (u[7] * len(ADPOSITIONS)).astype(np.int64), 0)
        zeros = np.zeros_like(verb)
        self._phrase(rows, SUBJECT, self._subject.draw(verb, u[8]), generator, busy=False)
        self._phrase(rows, OBJECT, self._object.draw(verb, u[9]), generator, busy=False)
        self._phrase(rows, RECIPIENT, np.where(frame == 2, self._person.draw(zeros, u[10]), 0), generator, busy=True)
        self._phrase(rows, LOCATION, np.where(has_place, self._place.draw(zeros, u[11]), 0), generator, busy=True)
        return rows

    def _phrase(self, rows: Rows, start: int, noun: Rows, generator: np.random.Generator, *, busy: bool) -> None:
        """Fill the columns of a participant; a `busy` one (recipient, place) gets half the decoration."""
        rates, share = self.rates, 0.5 if busy else 1.0
        u = generator.random((13, len(noun)))
        plain = (noun == 0) | self._is_name[noun]
        numeral = u[0] < rates.numeral * share
        plural = u[0] < (rates.numeral + rates.plural) * share
        count = np.where(numeral, 2 + (u[1] * len(NUMERALS)).astype(np.int64), plural.astype(np.int64))
        demonstrative = np.where(u[2] < rates.demonstrative * share, 1 + (u[3] * 2).astype(np.int64), 0)
        adjective = np.where(u[4] < rates.adjective * share, self._adjective.draw(noun, u[5]), 0)
        second = np.where((u[6] < rates.adjective_2 * share) & (adjective > 0), self._adjective.draw(noun, u[7]), 0)
        second = np.where(second == adjective, 0, second)
        possessor = np.where(u[8] < rates.possessor * share, self._person.draw(np.zeros_like(noun), u[9]), 0)
        relative = np.where(u[10] < rates.relative * share, self._relative.draw(noun, u[11]), 0)
        # A place is never the subject of a relative clause, and names take nothing at all.
        other = self._object.draw(relative, u[12])
        u = generator.random((2, len(noun)))
        columns = {
            COUNT: count,
            DEMONSTRATIVE: demonstrative,
            ADJECTIVE: adjective,
            ADJECTIVE_2: second,
            POSSESSOR: possessor,
            POSSESSOR_PLURAL: (possessor > 0) & ~self._is_name[possessor] & (u[0] < rates.plural),
            RELATIVE: relative,
            RELATIVE_OBJECT: other,
            RELATIVE_PLURAL: (other > 0) & ~self._is_name[other] & (u[1] < rates.plural),
        }
        rows[:, start + NOUN] = noun
        for column, values in columns.items():
            rows[:, start + column] = np.where(plain, 0, values)


def _by_rank(groups: Sequence[object], zipf: float) -> npt.NDArray[np.float64]:
    """Weights that fall with the rank within each entry's group: 1/2, 1/3, ... where `zipf` is 1."""
    seen: Counter[object] = Counter()
    weights = []
    for group in groups:
        seen[group] += 1
        weights.append((seen[group] + 1.0) ** -zipf)
    return np.array(weights)


def split_of(rows: Rows, buckets: int = _BUCKETS) -> npt.NDArray[np.str_]:
    """The split that each meaning belongs to, by its hash: one of 50 `buckets` valid, one test, the rest train.

    No seed enters.
    """
    state = np.full(len(rows), 0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(rows.shape[1]):
            state = (state ^ rows[:, column].astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            state ^= state >> np.uint64(29)
        state *= np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(32)
    bucket = state % np.uint64(buckets)
    return np.select([bucket == number for number in _HELD_OUT.values()], list(_HELD_OUT), default="train")


def _first_of_each(rows: Rows) -> Rows:
    """Each different row once, where it first occurs, in order."""
    _, first = np.unique(rows, axis=0, return_index=True)
    return rows[np.sort(first)]
