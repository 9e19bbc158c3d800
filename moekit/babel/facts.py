"""A corpus that knows things: facts about entities, told in every language in many forms; some of it is held out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moekit.babel import knowledge as k
from moekit.babel import meaning as m
from moekit.babel.agreement import Meanings, in_two_tenses
from moekit.babel.concepts import ANIMAL, FOOD, NAME, PERSON, PLACE, THING, Concepts, Noun, Verb
from moekit.babel.grammar import grammars, pick
from moekit.babel.knowledge import Ints, Knowledge, KnowledgeSettings
from moekit.babel.language import Language
from moekit.babel.questions import Questions
from moekit.babel.spoken import Blocks, Spoken
from moekit.errors import UserError
from moekit.source import (
    SPLITS,
    ChoiceQuestion,
    Direction,
    Information,
    LazySequence,
    Split,
    all_directions,
    choose_directions,
    digest,
    languages_of,
    register_source,
)

_BLOCK, _DRAW = 1024, 1280
_PATIENCE = 20
_ASKED = 4096  # statements of which agreement is asked
_CACHED_ROWS, _CACHED_SENTENCES = 64, 512
_PARALLEL, _ALONE = 0, 1  # streams of draws: parallel text, and from here on a language's own
_TEXT, _QUESTIONS, _AGREEING = 2, 3, 5
_SETTINGS = ("entities", "relations", "values", "power", "one_language", "profiles")
# Numbers of nouns, from 1: the head of a relative clause, what is asked for, and from here on the names.
_SOMEBODY, _WHAT, _NAMES = 1, 2, 3
# Values of the relations in turn: kinds of noun, and the verbs that lead to them.
_VALUES = ((THING, "thing"), (PLACE, "place"), (FOOD, "food"), (ANIMAL, "animal"))
_VERBS = {THING: "own build paint", PLACE: "visit guard leave", FOOD: "eat cook grow", ANIMAL: "feed ride fear"}
_LINK = "know"


@register_source
class Facts(Spoken):
    """Facts about entities in generated languages: what a model knows of them can be measured, and is bounded.

    A fact says that an entity has a value in a relation; one further relation, the link, leads from each entity to
    another. Each language tells facts in the forms of its grammar: a tense, an adverb or none, as a statement or as a
    question with its answer; and one sentence in ten puts two facts together, by a relative clause: who is linked to
    somebody who has a value. Sentence `index` of a split is a function of the settings and the index alone.

    Held out by hash are single forms of facts, a fiftieth for validation and as much for the test, and whole
    compositions. Validation and test text have the forms, of facts that the training text of the language tells in
    others; no sentence occurs twice in it. `questions` asks for these, for compositions, and for entities of whom no
    text tells anything.

    The text of one language tells the facts that all languages tell and those that it tells alone; parallel text tells
    the former. So a run on both is told of them twice as often.

    Args:
        languages: how many. The first eight are hand-made, the rest drawn, as babel's.
        entities: of whom something is told.
        relations: to values; each entity has one value in each.
        values: of each relation, all as likely: a fact holds ``ln(values)`` nats.
        power: the frequency of an entity's facts falls with its rank as ``1 / (rank + 10) ** power``; 0 = all alike.
        one_language: share of the facts that are told in one language only.
        unknowable: entities of whom nothing is told.
        profiles: share of the sentences that are profiles: an entity and several of its facts in a row.
        train_sentences: training sentences of each language, and as many pairs of each direction.
        valid_sentences, test_sentences: held-out ones, likewise; fewer where there are fewer forms.
        directions: only these, as "avl-tnd".
        seed: other seeds give other facts, words and sentences.

    Raises:
        UserError: a setting that is out of its range.

    Source: ours. That mixtures of experts hold facts like dense models of all their parameters: arXiv:2410.19034; facts
        told in many forms so that they can be extracted: arXiv:2309.14316; two-hop questions: arXiv:2405.15071.
    """

    name = "facts"
    knows_facts = True

    def __init__(
        self,
        *,
        languages: int = 4,
        entities: int = 2_000,
        relations: int = 4,
        values: int = 64,
        power: float = 0.7,
        one_language: float = 0.1,
        unknowable: int = 200,
        profiles: float = 0.0,
        train_sentences: int = 30_000,
        valid_sentences: int = 500,
        test_sentences: int = 500,
        directions: tuple[str, ...] | None = None,
        seed: int = 0,
    ) -> None:
        if languages < 2:
            raise UserError(f"facts: languages must be at least 2: got {languages}.")
        sizes = (train_sentences, valid_sentences, test_sentences)
        self.sizes: dict[Split, int] = dict(zip(SPLITS, sizes, strict=True))
        for split, size in self.sizes.items():
            if size < 0:
                raise UserError(f"facts: {split}_sentences must not be negative: got {size}.")
        settings = KnowledgeSettings(
            entities=entities,
            relations=relations,
            values=values,
            power=power,
            one_language=one_language,
            unknowable=unknowable,
            profiles=profiles,
        )
        rules = grammars(languages, seed)
        everyone = tuple(rule.code for rule in rules)
        self.directions = choose_directions(all_directions(everyone), wanted=directions)
        self.languages = languages_of(self.directions, everyone)
        self.seed, self.knowledge = seed, Knowledge(settings, languages, seed)
        self.concepts = _concepts(settings, seed)
        self._number = {code: number for number, code in enumerate(everyone)}
        self._speakers = {
            rule.code: Language(rule, self.concepts, seed=seed) for rule in rules if rule.code in self.languages
        }
        self._told = Blocks(self._count, languages + 1)
        self._held_out = Blocks(self._draw_held_out, len(SPLITS) * (languages + 1))
        self._rows = Blocks(self._draw, _CACHED_ROWS)
        self._sentences = Blocks(self._say, _CACHED_SENTENCES)

    # -- as a kind of source ---------------------------------------------------------------------------------------

    @classmethod
    def settings_from(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those that begin with ``facts_``, and babel's number of languages and of sentences; the first seed is 1."""
        return {name: given[f"facts_{name}"] for name in _SETTINGS} | {
            "seed": (given["seed"] - 1) % 2**32,
            "languages": given["babel_languages"],
            "train_sentences": given["babel_sentences"],
            "directions": given["directions"],
        }

    # -- the Source interface --------------------------------------------------------------------------------------

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs of one direction; both sides tell the same in the same form."""
        self.check_direction(direction)
        self.check_split(split)

        def pair(index: int) -> tuple[str, str]:
            return self._sentence(direction.source, split, index), self._sentence(direction.target, split, index)

        return LazySequence(self._size(None, split), pair)

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language, drawn apart from the parallel ones."""
        self.check_language(language)
        self.check_split(split)
        size = self._size(language, split)
        return LazySequence(size, lambda index: self._sentence(language, split, index, language))

    def fingerprint(self) -> str:
        """Digest of the settings and of what the languages sound like, so that a changed generator shows."""
        heard = self._heard(self._size, lambda code, split, index: self._sentence(code, split, index, code))
        settings = self.knowledge.settings
        return digest("facts", settings, self.sizes, len(self._number), *self.directions, self.seed, *heard)

    # -- truth -----------------------------------------------------------------------------------------------------

    def say(self, language: str, row: Sequence[int]) -> str:
        """The sentence of a language for a telling, a row of `moekit.babel.knowledge`."""
        self.check_language(language)
        kind, entity, relation, value, second, _, _, *profiled = row
        if kind == k.PROFILE:
            return self._profile(language, entity, [number - 1 for number in profiled if number], value)
        speaker, cells = self._speakers[language], self._cells(row)
        if kind == k.COMPOSITION:
            cells[m.OBJECT + m.NOUN], cells[m.OBJECT + m.RELATIVE] = _SOMEBODY, second + 1
            cells[m.OBJECT + m.RELATIVE_OBJECT] = self._noun(second, value)
        elif kind == k.QUESTION:
            cells[m.OBJECT + m.NOUN] = _WHAT
            return f"{speaker.say(cells)} ? {speaker.object_alone(self._noun(relation, value))}"
        return speaker.say(cells)

    def _cells(self, row: Sequence[int]) -> list[int]:
        """The meaning of a telling that is no profile, as a statement would put it."""
        _, entity, relation, value, _, tense, adverb, *_ = row
        cells = [0] * m.WIDTH
        cells[m.VERB], cells[m.TENSE], cells[m.ADVERB] = relation + 1, tense, adverb
        cells[m.SUBJECT + m.NOUN], cells[m.OBJECT + m.NOUN] = _NAMES + entity, self._noun(relation, value)
        return cells

    def _profile(self, language: str, entity: int, relations: list[int], last: int) -> str:
        values = self.knowledge.value[np.array(relations) * self.knowledge.entities + entity].tolist()
        values[-1] = last  # a question says it wrong
        told = [(relation + 1, self._noun(relation, value)) for relation, value in zip(relations, values, strict=True)]
        return self._speakers[language].entry(_NAMES + entity, told)

    def told(self, language: str | None) -> Ints:
        """Int64[facts], how often a language's training text tells each fact, compositions not counted.

        Of None, the parallel text.
        """
        return self._told(language)

    def held_out(self, language: str | None, split: Split) -> Ints:
        """Int64[n, columns], the tellings of validation or test text of a language; of None, of the parallel text."""
        return self._held_out(split, language)

    def information(self, language: str, split: Split) -> Information | None:
        """What each held-out sentence of a language costs one who knows the frequencies of what is told in training."""
        self.check_language(language)
        if self.check_split(split) == "train":
            return None
        rows, told = self.held_out(language, split), self.told(language) > 0
        found, which = self.knowledge.information(rows, self._number[language], told), np.log(len(self.languages))
        return Information((found.knowing + which).tolist(), (found.guessing + which).tolist())

    def salient(self, language: str) -> frozenset[str]:
        """The values of facts in all their forms, with their articles.

        Names are not among them: a name is mostly the entity that is told of.
        """
        self.check_language(language)
        first = self._noun(0, 0)
        nouns = range(first, first + min(self.knowledge.link, len(_VALUES)) * self.knowledge.settings.values)
        return frozenset().union(*map(self._speakers[language].objects, nouns))

    def questions(self, language: str, *, each: int, choices: int) -> list[ChoiceQuestion]:
        """Questions about facts in a language: known ones, composed ones, and of entities that nobody knows.

        Known facts are asked in forms of the test, one each, whatever is in the test's text: at the end of profiles as
        often as the text has these, or less often where few of their orders are held out; nowhere else if the text has
        nothing else. Compositions are those of the test. Wrong values are those of other facts of the
        same relation and decile, as often as these have them, so that frequencies alone give nothing away.

        Raises:
            UserError: an unknown language, more choices than values or than other entities, or fewer than no questions.
        """
        self.check_language(language)
        values, others = self.knowledge.settings.values, self.knowledge.entities - 1
        if not 2 <= choices <= values:
            raise UserError(f"facts: choices must be from 2 to the number of values, {values}: got {choices}.")
        if choices > others:  # of who an entity is linked to
            raise UserError(f"facts: choices must be fewer than entities, {others + 1}: got {choices}.")
        if each < 0:
            raise UserError(f"facts: there must be 0 or more questions of each decile and kind: got {each}.")
        number = self._number[language]
        generator = np.random.default_rng([self.seed, number, _QUESTIONS])
        questions = Questions(self.knowledge, number, self.told(language), generator)
        found = []
        for kind, decile, rows, answer in questions.ask(each, choices):
            sentences = tuple(self.say(language, row) for row in rows)
            found.append(ChoiceQuestion(kind, language, sentences, answer, decile))
        return found

    def _drawn_by(self, language: str) -> list[int]:
        return [self.seed, self._number[language]]

    def _meanings(self, language: str) -> Meanings:
        """Statements of the test, of facts that training tells; none where it tells them in profiles alone."""
        told = np.flatnonzero(self.told(language) > 0)
        if not len(told) or self.knowledge.settings.profiles == 1:
            return Meanings([], [])
        rows = self._forms(told, "test", kinds=(k.STATEMENT,))
        generator = np.random.default_rng([*self._drawn_by(language), _AGREEING])
        rows = rows[np.argsort(generator.random(len(rows)))[:_ASKED]]
        twice = in_two_tenses(rows, k.TENSE, k.ADVERB, lambda turned: self.knowledge.split(turned) != "train")
        cells = [[self._cells(row) for row in side.tolist()] for side in (rows, *twice)]
        return Meanings(cells[0], list(zip(*cells[1:], strict=True)))

    # -- blocks; text of one language has its code, parallel text None ---------------------------------------------

    def _size(self, alone: str | None, split: Split) -> int:
        return self.sizes[split] if split == "train" else len(self._held_out(split, alone))

    def _sentence(self, language: str, split: Split, index: int, alone: str | None = None) -> str:
        return self._sentences(language, split, alone, index // _BLOCK)[index % _BLOCK]

    def _say(self, language: str, split: Split, alone: str | None, block: int) -> list[str]:
        return [self.say(language, row) for row in self._rows(split, alone, block).tolist()]

    def _generator(self, split: Split, alone: str | None, block: int) -> np.random.Generator:
        stream = _PARALLEL if alone is None else _ALONE + self._number[alone]
        return np.random.default_rng([self.seed, SPLITS.index(split), stream, block, _TEXT])

    def _draw(self, split: Split, alone: str | None, block: int) -> Ints:
        if split != "train":
            return self._held_out(split, alone)[block * _BLOCK : (block + 1) * _BLOCK]
        generator, number = self._generator(split, alone, block), None if alone is None else self._number[alone]
        kept = np.empty((0, k.WIDTH), dtype=np.int64)
        while len(kept) < _BLOCK:
            rows = self.knowledge.draw(generator, _DRAW, number)
            kept = np.concatenate([kept, rows[self.knowledge.split(rows) == "train"]])
        return kept[:_BLOCK]

    def _draw_held_out(self, split: Split, alone: str | None) -> Ints:
        """Of all forms that there are, each at most once: drawn one after the other by their probabilities."""
        number, share = None if alone is None else self._number[alone], self.knowledge.settings.profiles
        rows, generator = self._forms(np.flatnonzero(self._told(alone)), split), self._generator(split, alone, 0)
        if not len(rows):
            return rows
        # Of exponential clocks the first to ring is drawn by its rate, and so is each that rings after it.
        waits = -np.log1p(-generator.random(len(rows))) * np.exp(self.knowledge.information(rows, number).knowing)
        rows = rows[np.argsort(waits, kind="stable")[: round((1 - share) * self.sizes[split])]]
        profiles = (
            self._held_out_profiles(split, alone, generator, self.sizes[split] - len(rows)) if share else rows[:0]
        )
        both = np.concatenate([rows, profiles])
        return both[np.argsort(generator.random(len(both)))] if share else both

    def _held_out_profiles(self, split: Split, alone: str | None, generator: np.random.Generator, wanted: int) -> Ints:
        """Profiles of a split, each once, of facts that training tells; fewer where there are few."""
        number, told = None if alone is None else self._number[alone], np.append(self._told(alone) > 0, True)
        found: dict[tuple[int, ...], None] = {}
        for _ in range(_PATIENCE):
            if len(found) >= wanted:
                break
            rows = self.knowledge.draw_profiles(generator, 100 * wanted, number)
            rows = rows[(self.knowledge.split(rows) == split) & told[self.knowledge.profiled(rows)].all(axis=1)]
            found |= dict.fromkeys(map(tuple, rows.tolist()))
        return np.array(list(found)[:wanted], dtype=np.int64).reshape(-1, k.WIDTH)

    def _forms(self, facts: Ints, split: Split, kinds: Sequence[int] = (k.STATEMENT, k.QUESTION)) -> Ints:
        """All forms of facts that belong to a split."""
        found = [np.empty((0, k.WIDTH), dtype=np.int64)]
        for kind, form in itertools.product(kinds, range(len(self.knowledge.forms))):
            rows = self.knowledge.tell(facts, kind, np.full(len(facts), form))
            found.append(rows[self.knowledge.split(rows) == split])
        return np.concatenate(found)

    def _count(self, alone: str | None) -> Ints:
        blocks = [self._draw("train", alone, block) for block in range(-(-self.sizes["train"] // _BLOCK))]
        rows = np.concatenate([np.empty((0, k.WIDTH), dtype=np.int64), *blocks])[: self.sizes["train"]]
        return self.knowledge.times_told(rows)

    def _noun(self, relation: int, value: int) -> int:
        """Number of the noun for a value of a relation, from 1."""
        settings = self.knowledge.settings
        if relation == self.knowledge.link:
            return _NAMES + value
        return _NAMES + settings.entities + settings.unknowable + relation % len(_VALUES) * settings.values + value


def _concepts(settings: KnowledgeSettings, seed: int) -> Concepts:
    """Names of three syllables, which a tokenizer cuts into several pieces, values of each kind, and the relations."""
    rng = random.Random(f"facts/{seed}/names")
    names: dict[str, None] = {}
    while len(names) < settings.entities + settings.unknowable:
        syllables = "".join(pick(rng, "ptkbdgmnlrsvf") + pick(rng, "aeiou") for _ in range(3))
        names[syllables + pick(rng, "nlrs")] = None
    nouns = [Noun("somebody", PERSON), Noun("what?", NAME), *(Noun(name, NAME) for name in names)]
    for kind, gloss in _VALUES[: settings.relations]:
        nouns += [Noun(f"{gloss}{number + 1}", kind) for number in range(settings.values)]
    verbs = []
    for number in range(settings.relations):
        turn, (kind, _) = number // len(_VALUES), _VALUES[number % len(_VALUES)]
        glosses = _VERBS[kind].split()
        verbs.append(Verb(glosses[turn] if turn < len(glosses) else f"{glosses[0]}{turn + 1}", NAME, kind))
    return Concepts(tuple(nouns), (*verbs, Verb(_LINK, NAME, NAME)), ())
