"""What is asked of a model that was told facts: those that it can know, compositions of them, and what nobody knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moekit.babel import knowledge as k
from moekit.babel.knowledge import Ints, Knowledge
from moekit.babel.profiles import LENGTH, NOT_TOLD, in_order
from moekit.source import DECILES, QuestionKind

_PATIENCE = 100  # orders of a profile; one in fifty is of the test


class Asked(NamedTuple):
    """One question.

    Attributes:
        kind: known, composed or unknowable.
        decile: of the fact by its frequency; of a composition that of the rarer fact; None = there is none.
        rows: tellings that differ in their values, one of them true.
        answer: number of the true one.
    """

    kind: QuestionKind
    decile: int | None
    rows: list[list[int]]
    answer: int


class _True(NamedTuple):
    """Of what a question is made: its kind, the true telling, and its decile."""

    kind: QuestionKind
    row: list[int]
    decile: int | None


class Questions:
    """Draws the questions of one language.

    Wrong values are those of other facts (of a composition: of other compositions) of the same relation and decile, as
    often as these have them. So the true value leans to frequent words as much as the wrong ones do, and one who knows
    how often each word is told, and no fact, answers as by chance. Where these have too few values, any others of the
    relation follow.

    Args:
        knowledge: all facts.
        language: number of the language.
        told: Int64[F], how often its training text tells each fact, compositions not counted.
        generator: where draws come from.
    """

    def __init__(self, knowledge: Knowledge, language: int, told: Ints, generator: np.random.Generator) -> None:
        self.knowledge, self.generator = knowledge, generator
        order = np.argsort(-knowledge.probs(language), kind="stable")
        order = order[told[order] > 0]
        self._deciles: Ints = np.full(len(knowledge.value), -1)
        self._deciles[order] = np.arange(len(order)) * DECILES // max(len(order), 1)
        self._entity, self._second = knowledge.compositions(language).T
        first = knowledge.first_fact(self._entity)
        parts = self._deciles[np.stack([first, knowledge.second_fact(self._entity, self._second)])]
        both = (parts >= 0).all(axis=0)
        self._entity, self._second, self._composed_decile = (
            self._entity[both],
            self._second[both],
            parts.max(axis=0)[both],
        )

    def ask(self, each: int, choices: int) -> list[Asked]:
        """`each` questions of every decile and kind that there are so many of, and as many that cannot be known."""
        found = [*self._known(each), *self._composed(each), *self._unknowable(each)]
        return [self._with_wrong_values(true, choices) for true in found]

    def _known(self, each: int) -> Iterator[_True]:
        told, forms = np.flatnonzero(self._deciles >= 0), range(len(self.knowledge.forms))
        tellings = [
            self.knowledge.tell(told, kind, np.full(len(told), form))
            for kind, form in itertools.product((k.STATEMENT, k.QUESTION), forms)
        ]
        rows = np.concatenate(tellings)
        rows = self._shuffled(rows[self.knowledge.split(rows) == "test"])
        if self.knowledge.settings.profiles:
            alone = self.knowledge.settings.profiles == 1  # a text that tells nothing otherwise teaches no other form
            rows = np.concatenate([self._at_the_end_of_profiles(told), rows[:0] if alone else rows])
        facts = self.knowledge.fact(rows)
        _, first = np.unique(facts, return_index=True)
        chosen = self._shuffled(np.sort(first)) if self.knowledge.settings.profiles else np.sort(first)
        return _of_each(rows[chosen], self._deciles[facts[chosen]], "known", each)

    def _at_the_end_of_profiles(self, told: Ints) -> Ints:
        """A profile of the test for a share of the facts, which stand at its end; its other facts are told ones too."""
        knowledge = self.knowledge
        share = self.generator.random(len(told)) < knowledge.settings.profiles
        relation, entity = np.divmod(told[share & (told < knowledge.link * knowledge.entities)], knowledge.entities)
        known = self._deciles.reshape(knowledge.relations, -1)[: knowledge.link, entity].T >= 0
        found = [np.empty((0, k.WIDTH), dtype=np.int64)]
        for _ in range(_PATIENCE):
            # The fact's own relation comes first in the order of the keys, and is then put behind the others.
            keys = np.where(known, self.generator.random(known.shape), NOT_TOLD)
            keys[np.arange(len(relation)), relation] = -1.0
            listed = in_order(keys)
            number = (listed > 0).sum(axis=1)
            turned = (np.arange(LENGTH) + 1) % np.maximum(number, 1)[:, None]
            listed = np.where(np.arange(LENGTH) < number[:, None], np.take_along_axis(listed, turned, axis=1), 0)
            rows = knowledge.profile(entity, listed)
            found.append(rows[knowledge.split(rows) == "test"])
        return np.concatenate(found)

    def _composed(self, each: int) -> Iterator[_True]:
        form = self._drawn(len(self.knowledge.forms), len(self._entity))
        rows = self.knowledge.compose(self._entity, self._second, form)
        chosen = self._shuffled(np.flatnonzero(self.knowledge.split(rows) == "test"))
        return _of_each(rows[chosen], self._composed_decile[chosen], "composed", each)

    def _unknowable(self, each: int) -> Iterator[_True]:
        knowledge, settings, number = self.knowledge, self.knowledge.settings, DECILES * each
        rows = np.zeros((number, k.WIDTH), dtype=np.int64)
        rows[:, k.KIND] = np.where(self._drawn(2, number), k.STATEMENT, k.QUESTION)
        rows[:, k.ENTITY] = settings.entities + self._drawn(settings.unknowable, number)
        rows[:, k.RELATION] = self._drawn(settings.relations, number)
        rows[:, k.VALUE] = self._drawn(settings.values, number)
        rows[:, [k.TENSE, k.ADVERB]] = knowledge.forms[self._drawn(len(knowledge.forms), number)]
        for row in rows.tolist():
            yield _True("unknowable", row, None)

    def _with_wrong_values(self, true: _True, choices: int) -> Asked:
        row, relation = true.row, _relation(true.row)
        linked = relation == self.knowledge.link
        everything = np.arange(self.knowledge.entities if linked else self.knowledge.settings.values)
        candidates = [self._pool(true), everything]
        drawn = dict.fromkeys(value for pool in candidates for value in self._shuffled(pool).tolist())
        wrong = (value for value in drawn if value != row[k.VALUE] and not (linked and value == row[k.ENTITY]))
        values = list(itertools.islice(wrong, choices - 1))
        answer = int(self._drawn(choices, 1)[0])
        values.insert(answer, row[k.VALUE])
        rows = [[*row[: k.VALUE], value, *row[k.VALUE + 1 :]] for value in values]
        return Asked(true.kind, true.decile, rows, answer)

    def _pool(self, true: _True) -> Ints:
        """Values that are true of others of the kind, relation and decile; one for each, so some occur repeatedly."""
        knowledge, relation = self.knowledge, _relation(true.row)
        if true.kind == "composed":
            alike = (self._second == relation) & (self._composed_decile == true.decile)
            return knowledge.value[knowledge.second_fact(self._entity[alike], self._second[alike])]
        if true.kind == "known":
            of_relation = slice(relation * knowledge.entities, (relation + 1) * knowledge.entities)
            return knowledge.value[of_relation][self._deciles[of_relation] == true.decile]
        return np.empty(0, dtype=np.int64)

    # Only `random` is drawn from: the streams of the other methods may change between numpy versions.

    def _shuffled(self, items: Ints) -> Ints:
        return items[np.argsort(self.generator.random(len(items)))]

    def _drawn(self, below: int, size: int) -> Ints:
        return (self.generator.random(size) * below).astype(np.int64)


def _relation(row: Sequence[int]) -> int:
    """The relation whose value is asked for."""
    return row[k.SECOND] if row[k.KIND] == k.COMPOSITION else row[k.RELATION]


def _of_each(rows: Ints, deciles: Ints, kind: QuestionKind, each: int) -> Iterator[_True]:
    """The first rows of each decile."""
    for decile in range(DECILES):
        for row in rows[deciles == decile][:each].tolist():
            yield _True(kind, row, decile)
