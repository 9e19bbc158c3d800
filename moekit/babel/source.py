"""The corpus: any number of sentences, in any number of generated languages, all of them parallel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import numpy as np

from moekit.babel import meaning as m
from moekit.babel.agreement import Meanings, in_two_tenses
from moekit.babel.concepts import DEFAULT_CONCEPTS, MINIMUM_CONCEPTS, concepts
from moekit.babel.grammar import grammars
from moekit.babel.language import Language
from moekit.babel.meaning import RATES, Complexity, Meaning, MeaningSampler, Rows, split_of
from moekit.babel.spoken import Blocks, Spoken
from moekit.babel.word_questions import UNSAID, Ints, WordQuestions, nouns_told
from moekit.errors import UserError, nearest
from moekit.source import (
    SPLITS,
    ChoiceQuestion,
    Direction,
    LazySequence,
    Split,
    all_directions,
    choose_directions,
    digest,
    languages_of,
    register_source,
)

_BLOCK = 1024
# Rows are ten times as large as sentences.
_CACHED_ROWS, _CACHED_SENTENCES = 64, 512
_PARALLEL, _MONOLINGUAL, _QUESTIONS, _AGREEING = 0, 1, 3, 4
_ASKED, _DRAWS = 8192, 24  # meanings drawn to ask for agreement, of which a fiftieth is of the test


@dataclass(frozen=True, kw_only=True)
class BabelSettings:
    """What a babel corpus is like.

    Attributes:
        languages: how many. The first eight are hand-made, the rest drawn.
        concepts: how many things can be talked about; each is a word in every language.
        complexity: "plain" sentences, or "rich" ones with possessors, relative clauses and second adjectives.
        train_sentences: parallel training sentences of every language not named in `sizes`.
        valid_sentences, test_sentences: held-out sentences; their meanings never occur in training.
        sizes: training sentences by language code. A direction has as many pairs as the smaller of its two languages.
        monolingual_sentences: training sentences of each language alone, on top of the parallel ones and different
            from them; 0 = `monolingual` gives the parallel ones.
        cognates: share of the words that sound alike everywhere.
        pivot: only directions from and into this language.
        directions: only these, as "avl-tnd".
        seed: other seeds give other words and other sentences; the hand-made grammars stay.
    """

    languages: int = 4
    concepts: int = DEFAULT_CONCEPTS
    complexity: Complexity = "plain"
    train_sentences: int = 30_000
    valid_sentences: int = 250
    test_sentences: int = 250
    sizes: dict[str, int] = field(default_factory=dict)
    monolingual_sentences: int = 0
    cognates: float = 0.15
    pivot: str | None = None
    directions: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.languages < 2:
            raise UserError(f"babel: languages must be at least 2: got {self.languages}.")
        if self.concepts < MINIMUM_CONCEPTS:
            raise UserError(f"babel: concepts must be at least {MINIMUM_CONCEPTS}: got {self.concepts}.")
        if self.complexity not in RATES:
            raise UserError(f"babel: complexity must be plain or rich: got {self.complexity!r}.")
        numbers = ("train_sentences", "valid_sentences", "test_sentences", "monolingual_sentences")
        counts = {name: getattr(self, name) for name in numbers}
        for name, count in (counts | {f"sizes.{code}": size for code, size in self.sizes.items()}).items():
            if count < 0:
                raise UserError(f"babel: {name} must not be negative: got {count}.")
        if not 0 <= self.cognates <= 1:
            raise UserError(f"babel: cognates must be a share between 0 and 1: got {self.cognates}.")


def hard_settings(**changes: Any) -> BabelSettings:
    """A harder corpus: eight languages in tiers of size, a thousand concepts, rich sentences."""
    tiers = {"kmb": 50_000, "shl": 50_000, "vrs": 10_000, "nhl": 10_000, "ori": 2_000, "tsq": 2_000}
    base = BabelSettings(
        languages=8,
        concepts=1_000,
        complexity="rich",
        train_sentences=100_000,
        sizes=tiers,
        monolingual_sentences=20_000,
    )
    return dataclasses.replace(base, **changes)


@register_source
class Babel(Spoken):
    """Generated languages with real differences of grammar, and known truth.

    One meaning is put into words by each language's own rules, so every pair of languages is parallel. Sentence
    `index` of a split is a function of the settings and the index alone; nothing is stored but a cache of blocks.
    Validation and test meanings are kept apart from training ones by their hash.

    Source: ours.
    """

    name = "babel"
    knows_meanings = True

    def __init__(self, settings: BabelSettings | None = None) -> None:
        self.settings = settings = settings or BabelSettings()
        self.concepts = concepts(settings.concepts, UNSAID)
        rules = grammars(settings.languages, settings.seed)
        everyone = tuple(grammar.code for grammar in rules)
        for code in settings.sizes:
            if code not in everyone:
                raise UserError(
                    f"babel: sizes must name languages of the corpus: got {code!r}. {nearest(code, everyone)}"
                )
        self.directions = choose_directions(all_directions(everyone), pivot=settings.pivot, wanted=settings.directions)
        self.languages = languages_of(self.directions, everyone)
        self._number = {code: number for number, code in enumerate(everyone)}
        self._speakers = {
            rule.code: Language(rule, self.concepts, seed=settings.seed, cognates=settings.cognates)
            for rule in rules
            if rule.code in self.languages
        }
        self._sampler = MeaningSampler(self.concepts, complexity=settings.complexity, seed=settings.seed)
        self._told = Blocks(self._count, len(everyone))  # sizes that directions may have
        self._held_out = Blocks(self._draw_held_out, len(SPLITS))
        self._agreeing = Blocks(self._draw_agreeing, 1)
        self._row_block = Blocks(self._draw, _CACHED_ROWS)
        self._sentence_block = Blocks(self._say, _CACHED_SENTENCES)

    # -- as a kind of source ---------------------------------------------------------------------------------------

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """The fields of `BabelSettings`."""
        return signature(BabelSettings).parameters

    @classmethod
    def from_parameters(cls, **given: Any) -> Babel:
        """A corpus with settings of these values."""
        return cls(BabelSettings(**given))

    @classmethod
    def settings_from(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings begin with ``babel_`` there; the first seed is 1, of the corpus 0."""
        return {
            "seed": (given["seed"] - 1) % 2**32,
            "languages": given["babel_languages"],
            "concepts": given["babel_concepts"],
            "cognates": given["babel_cognates"],
            "train_sentences": given["babel_sentences"],
            "sizes": given["babel_sizes"],
            "directions": given["directions"],
        }

    # -- the Source interface --------------------------------------------------------------------------------------

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs of one direction; both sides say meaning `index` of the split."""
        self.check_direction(direction)
        self.check_split(split)
        size = min(self.size(direction.source, split), self.size(direction.target, split))

        def pair(index: int) -> tuple[str, str]:
            return self.sentence(direction.source, split, index), self.sentence(direction.target, split, index)

        return LazySequence(size, pair)

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language: its own stream in training where the settings ask for one."""
        self.check_language(language)
        self.check_split(split)
        if split == "train" and self.settings.monolingual_sentences:
            size, stream = self.settings.monolingual_sentences, _MONOLINGUAL
        else:
            size, stream = self.size(language, split), _PARALLEL
        return LazySequence(size, lambda index: self.sentence(language, split, index, stream))

    def fingerprint(self) -> str:
        """Digest of the settings and of what the languages sound like, so that a changed generator shows."""
        return digest("babel", dataclasses.asdict(self.settings), *self._heard(self.size, self.sentence))

    # -- truth -----------------------------------------------------------------------------------------------------

    def language(self, code: str) -> Language:
        """The language itself: grammar and words."""
        self.check_language(code)
        return self._speakers[code]

    def size(self, language: str, split: Split) -> int:
        """Parallel sentences of a language in a split."""
        if split == "train":
            return self.settings.sizes.get(language, self.settings.train_sentences)
        return self.settings.valid_sentences if split == "valid" else self.settings.test_sentences

    def meaning(self, split: Split, index: int) -> Meaning:
        """What sentence `index` of a split says, in every language."""
        return Meaning.read(self._row_block(split, _PARALLEL, index // _BLOCK)[index % _BLOCK], self.concepts)

    def gloss(self, split: Split, index: int) -> str:
        """`meaning` as one line of English glosses, as ``see.past(farmer[old], dog[three])``."""
        return str(self.meaning(split, index))

    def sentence(self, language: str, split: Split, index: int, stream: int = _PARALLEL) -> str:
        """Sentence `index` of a split in one language; training has one for every index."""
        return self._sentence_block(language, split, stream, index // _BLOCK)[index % _BLOCK]

    def told(self, direction: Direction) -> Ints:
        """Int64[nouns], how often the training pairs of a direction have each noun."""
        self.check_direction(direction)
        return self._told(min(self.size(code, "train") for code in (direction.source, direction.target)))

    def word_questions(self, direction: Direction, *, each: int, choices: int) -> list[ChoiceQuestion]:
        """Does a model know the words for nouns? A sentence to translate, and translations that differ in one noun.

        The nouns to choose from are of one kind and about as frequent, and each is the true one as often as the others;
        what agrees with them in the sentence differs too. Unknowable are nouns that no text of the corpus has. Known
        ones may be guessed where words sound alike in several languages (`BabelSettings.cognates`).

        Raises:
            UserError: an unknown direction, choices that are too few or too many, or fewer than no questions.
        """
        self.check_direction(direction)
        if not 2 <= choices <= UNSAID:
            raise UserError(f"babel: choices must be from 2 to {UNSAID}: got {choices}.")
        if each < 0:
            raise UserError(f"babel: there must be 0 or more questions of each decile and kind: got {each}.")
        numbers = (self._number[code] for code in (direction.source, direction.target))
        generator = np.random.default_rng([self.settings.seed, *numbers, _QUESTIONS])
        speakers = self._speakers[direction.source], self._speakers[direction.target]
        found = []
        for kind, decile, rows, answer in WordQuestions(self._sampler, self.told(direction), generator).ask(
            each, choices
        ):
            sentences = tuple(map(speakers[1].say, rows))
            source = speakers[0].say(rows[answer])
            found.append(ChoiceQuestion(kind, direction.target, sentences, answer, decile, source, direction.source))
        return found

    def _drawn_by(self, language: str) -> list[int]:
        return [self.settings.seed, self._number[language]]

    def _meanings(self, language: str) -> Meanings:
        return self._agreeing()

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _draw_agreeing(self) -> Meanings:
        """Meanings of the test, each once, whatever is in its text: the same for every language."""
        generator = np.random.default_rng([self.settings.seed, _AGREEING])
        drawn = (self._sampler.draw(generator, _ASKED) for _ in range(_DRAWS))
        rows = np.unique(np.concatenate([found[split_of(found) == "test"] for found in drawn]), axis=0)
        twice = in_two_tenses(rows, m.TENSE, m.ADVERB, lambda turned: split_of(turned) != "train")
        return Meanings(rows.tolist(), list(zip(*(side.tolist() for side in twice), strict=True)))

    def _draw(self, split: Split, stream: int, block: int) -> list[list[int]]:
        if split == "train":
            return self._sampler.block(split, block, _BLOCK, stream).tolist()
        rows, start = self._held_out(split, stream), block * _BLOCK
        if start >= len(rows):
            raise IndexError(f"babel: {split} holds {len(rows):,} sentences: got an index from {start:,} on.")
        return rows[start : start + _BLOCK].tolist()

    def _count(self, size: int) -> Ints:
        """How often the first `size` meanings of training have each noun."""
        found = np.zeros(len(self.concepts.nouns), dtype=np.int64)
        for block in range(-(-size // _BLOCK)):
            rows = self._sampler.block("train", block, _BLOCK, _PARALLEL)[: size - block * _BLOCK]
            found += nouns_told(rows, len(found))
        return found

    def _draw_held_out(self, split: Split, stream: int) -> Rows:
        """All of it in one go, so that no sentence occurs twice."""
        return self._sampler.block(split, 0, self.size(self.languages[0], split), stream)

    def _say(self, language: str, split: Split, stream: int, block: int) -> list[str]:
        return [self._speakers[language].say(row) for row in self._row_block(split, stream, block)]
