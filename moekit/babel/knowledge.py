"""What there is to know: facts about entities, how often each is told, and the probability of every way to tell one.

A fact is (entity, relation) -> value. Every value relation draws its values evenly from values of its own kind; one
further relation, the link, leads from each entity to another and is a bijection. Entities are told of by a power law of
their rank. A telling is a row of integers, and its probability is known; so the entropy of the text is a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moekit.babel.concepts import ADVERBS, TENSES
from moekit.babel.meaning import split_of
from moekit.babel.profiles import LENGTH, Profiles, steps
from moekit.errors import UserError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Columns of a telling; ids count from 0, ADVERB from 1 (0 = none). SECOND is 0 but for a composition. A profile has in
# the columns behind the relations that it tells of, from 1 (0 = no more); RELATION and VALUE are those of the last.
KIND, ENTITY, RELATION, VALUE, SECOND, TENSE, ADVERB = range(7)
PROFILED = slice(7, 7 + LENGTH)
WIDTH = 7 + LENGTH
STATEMENT, QUESTION, COMPOSITION, PROFILE = range(4)

_COMPOSED, _ASKED, _ADVERB = 0.1, 0.25, 0.5
_SINGLE = np.array([(1 - _COMPOSED) * (1 - _ASKED), (1 - _COMPOSED) * _ASKED, _COMPOSED])  # kinds but for profiles
_STEEPEST = 40.0  # with ten million entities the rarest fact still has a probability above 0
_COMPOSED_BUCKETS = 10  # so many compositions are held out that they can be asked


@dataclass(frozen=True, kw_only=True)
class KnowledgeSettings:
    """How much there is to know, and how it is told.

    Attributes:
        entities: of whom something is told.
        relations: beside the link; an entity has a value in each of them.
        values: of each relation; they are drawn evenly.
        power: the probability of an entity's facts falls with its rank as ``1 / (rank + 10) ** power``; 0 = all alike.
        one_language: share of the facts that are told in one language only.
        unknowable: entities of whom nothing is told.
        profiles: share of the tellings that are profiles, an entity and several of its facts in a row.
    """

    entities: int = 2_000
    relations: int = 4
    values: int = 64
    power: float = 0.7
    one_language: float = 0.1
    unknowable: int = 200
    profiles: float = 0.0

    def __post_init__(self) -> None:
        least = {"entities": 4, "relations": 1, "values": 2, "unknowable": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UserError(f"facts: {name} must be at least {lowest}: got {getattr(self, name)}.")
        if self.power < 0:
            raise UserError(f"facts: power must not be negative: got {self.power}.")
        if not self.power <= _STEEPEST:
            raise UserError(f"facts: power must be a number up to {_STEEPEST:g}: got {self.power}.")
        if not 0 <= self.one_language < 1:
            raise UserError(f"facts: one_language must be a share from 0 to below 1: got {self.one_language}.")
        if not 0 <= self.profiles <= 1:
            raise UserError(f"facts: profiles must be a share from 0 to 1: got {self.profiles}.")


@dataclass(frozen=True)
class Nats:
    """Information in nats: of one who knows all facts that are told, and of one who knows grammar and frequencies.

    The second knows how often each entity, relation and value are told, and not which value belongs to which entity.

    Attributes:
        knowing: Float64[n], or a mean.
        guessing: of the same shape.
    """

    knowing: Any
    guessing: Any


class Knowledge:
    """All facts of a corpus, by fact: number ``relation * entities + entity``, the link being the last relation.

    Args:
        settings: how much there is to know.
        languages: how many tell it.
        seed: other seeds give other facts.

    Attributes:
        value: Int64[F], the value of each fact; of a link the other entity.
        weight: Float64[F], probability of each fact where all are told.
        only: Int64[F], the language that alone tells it; -1 = all do.
        forms: Int64[M, 2], tense and adverb of every form of a telling.
        form_probs: Float64[M], their probabilities.
        kind_probs: Float64[4], the probabilities of the kinds of tellings.
    """

    def __init__(self, settings: KnowledgeSettings, languages: int, seed: int) -> None:
        self.settings, self.languages, self.seed = settings, languages, seed
        self.entities, self.relations = settings.entities, settings.relations + 1
        self.link = settings.relations
        # Only `random` is drawn from: the streams of the other methods may change between numpy versions.
        generator = np.random.default_rng([seed, 7])
        count = self.entities * self.relations
        values = (generator.random((settings.relations, self.entities)) * settings.values).astype(np.int64)
        # One cycle through all entities: nobody is linked to himself.
        cycle = np.argsort(generator.random(self.entities))
        link = np.empty(self.entities, dtype=np.int64)
        link[cycle] = np.roll(cycle, -1)
        self.value: Ints = np.concatenate([values.ravel(), link])
        rank = np.argsort(np.argsort(generator.random(self.entities)))
        weight = np.tile((rank + 10.0) ** -settings.power, self.relations)
        self.weight: Floats = weight / weight.sum()
        alone, which = generator.random((2, count))
        self.only: Ints = np.where(alone < settings.one_language, (which * languages).astype(np.int64), -1)
        forms = [(t, a) for t, tense in enumerate(TENSES) for a in _adverbs(tense)]
        self.forms: Ints = np.array(forms, dtype=np.int64)
        spoken = np.array([sum(other == t for other, _ in forms) - 1 for t, _ in forms])
        self.form_probs: Floats = np.where(self.forms[:, 1] > 0, _ADVERB / spoken, 1 - _ADVERB) / len(TENSES)
        self.kind_probs: Floats = np.array([*(1 - settings.profiles) * _SINGLE, settings.profiles])
        self._steps = {number: steps(self.probs(number)) for number in (None, *range(languages))}
        self._pairs = {number: self._composable(number) for number in (None, *range(languages))}
        self._profiles = {number: self._profiled(self.probs(number)) for number in (None, *range(languages))}
        if not all(map(len, self._pairs.values())):
            raise UserError(
                "facts: every language must tell an entity's link and a value of who it is linked to: got too few of "
                f"{count} facts. Raise entities, or lower one_language."
            )

    # -- how often what is told ------------------------------------------------------------------------------------

    def allowed(self, language: int | None) -> npt.NDArray[np.bool_]:
        """Bool[F], which facts a language tells; of None, those that all languages tell."""
        return (self.only == -1) | (self.only == (-2 if language is None else language))

    def probs(self, language: int | None) -> Floats:
        """Float64[F], the probability of each fact in text of a language; of None, in parallel text."""
        weight = self.weight * self.allowed(language)
        return np.asarray(weight / weight.sum())

    def compositions(self, language: int | None) -> Ints:
        """Int64[C, 2], entity and second relation of all compositions of facts that a language tells, all as likely."""
        return self._pairs[language]

    def _composable(self, language: int | None) -> Ints:
        allowed = self.allowed(language).reshape(self.relations, self.entities)
        other = self.value[self.link * self.entities :]
        second, entity = np.nonzero(allowed[self.link] & allowed[: self.link, other])
        return np.stack([entity, second], axis=1)

    # -- tellings --------------------------------------------------------------------------------------------------

    def draw(self, generator: np.random.Generator, size: int, language: int | None) -> Ints:
        """Int64[size, WIDTH], independent tellings of any split."""
        u = generator.random((5, size))
        kind = np.where(u[0] < _COMPOSED, COMPOSITION, np.where(u[1] < _ASKED, QUESTION, STATEMENT))
        composed = self._pairs[language]
        fact = np.searchsorted(self._steps[language], u[2], side="right")
        form = np.searchsorted(steps(self.form_probs), u[3], side="right")
        rows = self.tell(fact, kind, form)
        chosen = composed[(u[4] * len(composed)).astype(np.int64)]
        rows = np.where((kind == COMPOSITION)[:, None], self.compose(chosen[:, 0], chosen[:, 1], form), rows)
        if not self.settings.profiles:
            return rows
        profile = generator.random(size) < self.settings.profiles
        return np.where(profile[:, None], self.draw_profiles(generator, size, language), rows)

    def draw_profiles(self, generator: np.random.Generator, size: int, language: int | None) -> Ints:
        """Int64[size, WIDTH], independent profiles of any split."""
        entity, listed = self._profiles[language].draw(generator, size)
        return self.profile(entity, listed)

    def profile(self, entity: Ints, listed: Ints) -> Ints:
        """Int64[n, WIDTH], the profiles of entities.

        Args:
            entity: Int64[n].
            listed: Int64[n, LENGTH], the relations in their order, from 1; 0 = no more.
        """
        rows = np.zeros((len(entity), WIDTH), dtype=np.int64)
        last = np.take_along_axis(listed, np.maximum((listed > 0).sum(axis=1) - 1, 0)[:, None], axis=1)[:, 0] - 1
        rows[:, KIND], rows[:, ENTITY], rows[:, PROFILED] = PROFILE, entity, listed
        rows[:, RELATION], rows[:, VALUE] = last, self.value[last * self.entities + entity]
        return rows

    def tell(self, fact: Ints, kind: Ints | int, form: Ints) -> Ints:
        """Int64[n, WIDTH], tellings of facts."""
        relation, entity = np.divmod(fact, self.entities)
        rows = np.zeros((len(fact), WIDTH), dtype=np.int64)
        rows[:, KIND], rows[:, ENTITY], rows[:, RELATION], rows[:, VALUE] = kind, entity, relation, self.value[fact]
        rows[:, [TENSE, ADVERB]] = self.forms[form]
        return rows

    def compose(self, entity: Ints, second: Ints, form: Ints) -> Ints:
        """Int64[n, WIDTH]: an entity is linked to somebody who has a value in the second relation."""
        rows = np.zeros((len(entity), WIDTH), dtype=np.int64)
        rows[:, KIND], rows[:, ENTITY], rows[:, RELATION] = COMPOSITION, entity, self.link
        rows[:, SECOND], rows[:, VALUE] = second, self.value[self.second_fact(entity, second)]
        rows[:, [TENSE, ADVERB]] = self.forms[form]
        return rows

    def first_fact(self, entity: Ints) -> Ints:
        """Int64[n], the link of entities."""
        return self.link * self.entities + entity

    def second_fact(self, entity: Ints, second: Ints) -> Ints:
        """Int64[n], the fact of whom the entities are linked to."""
        return second * self.entities + self.value[self.first_fact(entity)]

    def fact(self, rows: Ints) -> Ints:
        """Int64[n], the facts that statements and questions tell."""
        return np.asarray(rows[:, RELATION] * self.entities + rows[:, ENTITY])

    def profiled(self, rows: Ints) -> Ints:
        """Int64[n, LENGTH], the facts that profiles tell; -1 = no more."""
        relation = rows[:, PROFILED] - 1
        return np.where(relation < 0, -1, relation * self.entities + rows[:, ENTITY, None])

    def times_told(self, rows: Ints) -> Ints:
        """Int64[F], how often tellings tell each fact by itself or in a profile, and not in a composition."""
        kind = rows[:, KIND]
        single, listed = rows[(kind != COMPOSITION) & (kind != PROFILE)], self.profiled(rows[kind == PROFILE])
        facts = np.concatenate([self.fact(single), listed[listed >= 0]])
        return np.bincount(facts, minlength=len(self.value))

    @staticmethod
    def split(rows: Ints) -> npt.NDArray[np.str_]:
        """The split of each telling by its hash: of a fact each form has its own, of a composition all have one."""
        kind, keys = rows[:, KIND], rows[:, : PROFILED.start].copy()
        composed = kind == COMPOSITION
        keys[:, [TENSE, ADVERB]] *= ~composed[:, None]
        single = np.where(composed, split_of(keys, _COMPOSED_BUCKETS), split_of(keys))
        return np.where(kind == PROFILE, split_of(rows), single) if (kind == PROFILE).any() else single

    # -- information -----------------------------------------------------------------------------------------------

    def information(self, rows: Ints, language: int | None, told: npt.NDArray[np.bool_] | None = None) -> Nats:
        """-ln of the probability of each telling in text of a language, in the order of `rows`.

        Args:
            rows: Int64[n, WIDTH].
            language: whose text.
            told: Bool[F], the facts that can be meant, where it is known that they are these.
        """
        probs = self.probs(language)
        if told is not None:
            probs = probs * told / max((probs * told).sum(), np.finfo(float).tiny)
        profile = rows[:, KIND] == PROFILE
        known, guessed = np.empty((2, len(rows)))
        known[~profile], guessed[~profile] = self._information_of_one(rows[~profile], probs, language)
        known[profile], guessed[profile] = self._information_of_profiles(rows[profile], probs)
        with np.errstate(divide="ignore"):  # of what is never told infinitely much
            kind = np.log(self.kind_probs[rows[:, KIND]])
        return Nats(known - kind, guessed - kind)

    def _information_of_one(self, rows: Ints, probs: Floats, language: int | None) -> tuple[Floats, Floats]:
        """Nats of statements, questions and compositions but for which of these they are: knowing, guessing."""
        composed = rows[:, KIND] == COMPOSITION
        fact = np.where(composed, 0, self.fact(rows))
        tense_adverb = np.zeros((len(TENSES), len(ADVERBS) + 1))
        tense_adverb[tuple(self.forms.T)] = self.form_probs
        what = np.where(composed, 1 / len(self.compositions(language)), probs[fact])
        # That an entity has this value, to one who does not know it: how often the relation has it.
        single, double = self._marginal(probs), self._composed_marginal(language)
        value = np.where(composed, double[rows[:, SECOND], rows[:, VALUE] % double.shape[1]], single[fact])
        known = -np.log(tense_adverb[rows[:, TENSE], rows[:, ADVERB]]) - np.log(what)
        return known, known - np.log(value)

    def _information_of_profiles(self, rows: Ints, probs: Floats) -> tuple[Floats, Floats]:
        """Nats of profiles but for that they are some: knowing, guessing."""
        profiles, listed = self._profiled(probs), self.profiled(rows)
        known = profiles.information(rows[:, ENTITY])
        share = np.append(self._marginal(self._padded(profiles.told)), 1.0)  # the last is that of no fact, -1
        return known, known - np.log(share[listed]).sum(axis=1)

    def entropy(self, language: int | None) -> Nats:
        """Mean nats of a telling of any split.

        Held-out forms are chosen by hash and not by what they say, so text of a split has this mean but for chance:
        with n tellings an error of about the standard deviation of `information` over the root of n.
        """
        probs, profiles, share = self.probs(language), self._profiles[language], self.settings.profiles
        alone, composed = (1 - share) * (1 - _COMPOSED), (1 - share) * _COMPOSED
        known = _entropy(self.kind_probs) + (1 - share) * _entropy(self.form_probs) + alone * _entropy(probs)
        known += composed * np.log(len(self.compositions(language))) + share * profiles.entropy()
        value = alone * self._guesses(probs) + share * self._guesses(self._padded(profiles.told))
        value -= composed * np.log(self._composed_marginal(language)[self._composed(language)]).mean()
        return Nats(known, known + value)

    def _profiled(self, probs: Floats) -> Profiles:
        """Profiles of the facts that are told with these probabilities, but for links."""
        return Profiles(probs.reshape(self.relations, self.entities)[: self.link])

    def _padded(self, by_relation: Floats) -> Floats:
        """Float64[F], numbers by relation and entity for all facts: none for links."""
        return np.append(by_relation.ravel(), np.zeros(self.entities))

    def _guesses(self, told: Floats) -> float:
        """Nats of all values that are told so often, to one who knows how often each relation has each."""
        used = told > 0
        return float(-(told[used] * np.log(self._marginal(told)[used])).sum())

    def _marginal(self, probs: Floats) -> Floats:
        """Float64[F], the probability of each fact's value where its relation alone is known."""
        relation = np.repeat(np.arange(self.relations), self.entities)
        width = int(self.value.max()) + 1
        table = np.bincount(relation * width + self.value, weights=probs, minlength=self.relations * width)
        table = table.reshape(self.relations, width)
        total = table.sum(axis=1, keepdims=True)
        return np.asarray((table / np.where(total == 0, 1, total))[relation, self.value])

    def _composed(self, language: int | None) -> tuple[Ints, Ints]:
        """Second relations and values of all compositions."""
        entity, second = self.compositions(language).T
        return second, self.value[self.second_fact(entity, second)]

    def _composed_marginal(self, language: int | None) -> Floats:
        """Float64[R, V], the probability of each value in compositions where the second relation alone is known."""
        table = np.zeros((self.link, self.settings.values))
        np.add.at(table, self._composed(language), 1.0)
        return np.asarray(table / np.maximum(table.sum(axis=1, keepdims=True), 1))


def _adverbs(tense: str) -> list[int]:
    """Numbers of the adverbs that go with a tense; 0 = none."""
    return [0, *(number for number, (_, only) in enumerate(ADVERBS, start=1) if only in (None, tense))]


def _entropy(probs: Floats) -> float:
    used = probs[probs > 0]
    return float(-(used * np.log(used)).sum())
