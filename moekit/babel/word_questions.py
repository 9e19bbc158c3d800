"""What is asked of a model that translates: does it know the word for a noun, by how often its text has that noun?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moekit.babel import meaning as m
from moekit.babel.concepts import NAME
from moekit.babel.meaning import MeaningSampler, Rows, split_of
from moekit.source import DECILES, QuestionKind

Ints = npt.NDArray[np.int64]

UNSAID = 32
"""Nouns of each kind that no text has: a question cannot have more to choose from."""

_PHRASES = (m.SUBJECT, m.OBJECT, m.RECIPIENT, m.LOCATION)
_NOUNS = [start + column for start in _PHRASES for column in (m.NOUN, m.POSSESSOR, m.RELATIVE_OBJECT)]
# Rows drawn at a time, of which a fiftieth is of the test, and draws before a kind of noun is given up.
_DRAW, _PATIENCE = 8192, 40


class AskedWord(NamedTuple):
    """One question.

    Attributes:
        kind: known or unknowable.
        decile: of the true noun by its frequency; None = no text has it.
        rows: meanings that differ in one noun.
        answer: number of the one that is said.
    """

    kind: QuestionKind
    decile: int | None
    rows: list[list[int]]
    answer: int


def nouns_told(rows: Rows, number: int) -> Ints:
    """Int64[number], how often each noun occurs in some meanings, wherever in the sentence."""
    return np.bincount(rows[:, _NOUNS].ravel(), minlength=number + 1)[1:]


class WordQuestions:
    """Draws the questions of one direction.

    Nouns of a kind are parted into sets of as many as a question has choices: neighbours by frequency, or, of those
    that are never said, any. A question is about a set, and every noun of a set is the true one as often as the
    others. So who knows which words are frequent, which are short, and what fits a verb, but not what a noun is called
    in the other language, answers as by chance. Nouns that are left over, fewer than a set, are not asked for; names,
    which sound alike everywhere, neither.

    The meaning is one of the test with the noun put in: its row belongs to the test, so no training text says it.

    Args:
        sampler: of the corpus.
        told: Int64[nouns], how often training text has each; the unsaid ones not among them.
        generator: where draws come from.
    """

    def __init__(self, sampler: MeaningSampler, told: Ints, generator: np.random.Generator) -> None:
        self.sampler, self.told, self.generator = sampler, told, generator
        self._kinds = np.array([noun.kind for noun in (*sampler.concepts.nouns, *sampler.concepts.unsaid)])

    def ask(self, each: int, choices: int) -> list[AskedWord]:
        """`each` questions of every decile that has a set, and ten times as many about nouns that cannot be known."""
        known = np.flatnonzero((self.told > 0) & (self._kinds[: len(self.told)] != NAME))
        known = known[np.argsort(-self.told[known], kind="stable")]
        deciles = np.full(len(self._kinds), -1)
        deciles[known] = np.arange(len(known)) * DECILES // max(len(known), 1)
        sets = self._sets(known, choices)
        of_decile = [[noun for noun in known[deciles[known] == d].tolist() if noun in sets] for d in range(DECILES)]
        chosen = [noun for nouns in of_decile for noun in self._drawn(nouns, each)]
        unsaid = self._sets(self._shuffled(np.arange(len(self.told), len(self._kinds))), choices)
        found = self._asked("known", chosen, sets, deciles)
        return found + self._asked("unknowable", self._drawn(list(unsaid), DECILES * each), unsaid, deciles)

    def _sets(self, nouns: Ints, choices: int) -> dict[int, Ints]:
        """The set of each noun that has one; sets are of nouns of a kind that follow each other in `nouns`."""
        found: dict[int, Ints] = {}
        for kind in sorted({*self._kinds.tolist()}):
            own = nouns[self._kinds[nouns] == kind]
            for members in own[: len(own) // choices * choices].reshape(-1, choices):
                found |= dict.fromkeys(members.tolist(), members)
        return found

    def _drawn(self, nouns: Sequence[int], number: int) -> list[int]:
        """So many of the nouns in random order, each as often as the others, or once more."""
        order = self._shuffled(np.array(nouns, dtype=np.int64)).tolist()
        return (order * -(-number // max(len(order), 1)))[:number]

    def _asked(self, kind: QuestionKind, nouns: Sequence[int], sets: dict[int, Ints], deciles: Ints) -> list[AskedWord]:
        found = []
        for noun, place, row in self._meanings(nouns):
            members = self._shuffled(sets[noun]).tolist()
            rows = [[*row[:place], member + 1, *row[place + 1 :]] for member in members]
            decile = int(deciles[noun]) if deciles[noun] >= 0 else None
            found.append(AskedWord(kind, decile, rows, members.index(noun)))
        return found

    def _meanings(self, nouns: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """Each noun with a meaning of the test that has it, and its column there; each time another meaning."""
        wanted = {
            kind: [noun for noun in nouns if self._kinds[noun] == kind]
            for kind in dict.fromkeys(self._kinds[list(nouns)])
        }
        found: dict[int, list[tuple[int, list[int]]]] = {}
        for _ in range(_PATIENCE if nouns else 0):
            if not any(wanted.values()):
                break
            rows = self.sampler.draw(self.generator, _DRAW)
            for kind, waiting in wanted.items():
                places = [(start + m.NOUN) for start in _PHRASES]
                own = np.append(self._kinds, "")[rows[:, places] - 1] == kind  # of no noun the last
                which, slot = np.nonzero(own)
                if not waiting or not len(which):
                    continue
                tried = np.array(waiting)[np.arange(len(which)) % len(waiting)]
                made, column = rows[which], np.array(places)[slot]
                made[np.arange(len(made)), column] = tried + 1
                for number in np.flatnonzero(split_of(made) == "test"):
                    noun = int(tried[number])
                    if noun in waiting:
                        waiting.remove(noun)
                        found.setdefault(noun, []).append((int(column[number]), made[number].tolist()))
        order = [noun for noun in nouns if noun in found]
        return [(noun, *found[noun].pop()) for noun in order if found[noun]]

    # Only `random` is drawn from: the streams of the other methods may change between numpy versions.

    def _shuffled(self, items: Ints) -> Ints:
        return items[np.argsort(self.generator.random(len(items)))]
