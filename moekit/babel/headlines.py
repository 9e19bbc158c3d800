"""Summaries with known truth: paragraphs of babel sentences, and the headline of each, in every language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import numpy as np

from moekit.babel import meaning as m
from moekit.babel.meaning import Meaning, MeaningSampler
from moekit.babel.source import Babel
from moekit.babel.spoken import Blocks
from moekit.errors import UserError, nearest
from moekit.source import SPLITS, Direction, LazySequence, Source, Split, digest, languages_of, register_source

_BLOCK, _POOL = 256, 1024
_STREAM = 2  # beside babel's parallel and monolingual text
_CACHED = 256
_OF_BABEL = ("seed", "languages", "concepts", "cognates", "directions")


@register_source
class Headlines(Source):
    """Paragraphs and their headlines, in one language or from one into another.

    A paragraph is some sentences about different figures; one figure, the protagonist, is the subject of two of them,
    everybody else of one. The headline says the first thing that the protagonist does, without adjectives, numerals,
    place and adverb: so a model must find who the paragraph is about, choose a sentence, leave out what is not needed,
    and say it in the language asked for. A headline is never a part of the text word for word, where the sentence had
    anything to leave out.

    A stand-in for summarisation corpora such as Wikilingua where no text can be fetched: several languages, documents
    parallel across them, selection and compression that can be learnt and judged. It is no natural text, its paragraphs
    are no stories, and each has one right headline: scores on it say that fine-tuning works, and nothing about
    summarising newspapers. For real text put documents and summaries into two "languages" of any other source.

    Paragraphs are made of meanings of their split alone, so that no sentence of a test paragraph occurs in training.

    Args:
        corpus: whose languages, words and seed are used.
        train_documents, valid_documents, test_documents: how many.
        sentences: of a paragraph.
        directions: as ``avl-avl`` (the default: each language into itself) or ``avl-tnd``.

    Raises:
        UserError: a direction of unknown languages, fewer than 3 sentences, or a negative number.

    Source: ours; the task is that of arXiv:2010.03093 (WikiLingua).
    """

    name = "headlines"

    def __init__(
        self,
        corpus: Babel,
        *,
        train_documents: int = 10_000,
        valid_documents: int = 250,
        test_documents: int = 250,
        sentences: int = 4,
        directions: Sequence[str] | None = None,
    ) -> None:
        if sentences < 3:
            raise UserError(f"headlines: a paragraph must have 3 sentences or more: got {sentences}.")
        documents = (train_documents, valid_documents, test_documents)
        self.sizes: dict[Split, int] = dict(zip(SPLITS, documents, strict=True))
        if min(self.sizes.values()) < 0:
            raise UserError(f"headlines: numbers of documents must not be negative: got {self.sizes}.")
        self.corpus, self.sentences = corpus, sentences
        possible = {f"{a}-{b}": Direction(a, b) for a in corpus.languages for b in corpus.languages}
        wanted = [f"{a}-{a}" for a in corpus.languages] if directions is None else list(dict.fromkeys(directions))
        for name in wanted:
            if name not in possible:
                raise UserError(
                    f"headlines: directions must be of the languages: got {name}. {nearest(name, possible)}"
                )
        if not wanted:
            raise UserError("headlines: at least one direction is required: got none.")
        self.directions = tuple(possible[name] for name in wanted)
        self.languages = languages_of(self.directions, corpus.languages)
        settings = corpus.settings
        self._sampler = MeaningSampler(corpus.concepts, complexity=settings.complexity, seed=settings.seed)
        self._rows, self._texts = Blocks(self._draw, _CACHED), Blocks(self._say, _CACHED)

    # -- as a kind of source ---------------------------------------------------------------------------------------

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """Its own, and those of its corpus."""
        return {**Babel.parameters(), **_own_parameters()}

    @classmethod
    def from_parameters(cls, **given: Any) -> Headlines:
        """A corpus of babel, and its headlines."""
        own = {name: given.pop(name) for name in _own_parameters() if name in given}
        return cls(Babel.from_parameters(**given), **own)

    @classmethod
    def settings_from(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of babel; its number of sentences is that of paragraphs."""
        named = Babel.settings_from(given)
        documents = named.pop("train_sentences")
        return {"train_documents": documents, **{name: named[name] for name in _OF_BABEL}}

    # -- the Source interface --------------------------------------------------------------------------------------

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Paragraphs in the direction's first language, headlines in its second."""
        self.check_direction(direction)
        return self._pairs(direction, self.check_split(split))

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Paragraphs and headlines of one language."""
        self.check_language(language)
        pairs = self._pairs(Direction(language, language), self.check_split(split))
        return [text for pair in pairs for text in pair]

    def _pairs(self, direction: Direction, split: Split) -> LazySequence[tuple[str, str]]:
        def pair(index: int) -> tuple[str, str]:
            return self.text(direction.source, split, index)[0], self.text(direction.target, split, index)[1]

        return LazySequence(self.sizes[split], pair)

    def fingerprint(self) -> str:
        """Digest of the settings and of some of the text."""
        heard = [text for code in self.languages for pair in self._texts(code, "valid", 0)[:8] for text in pair]
        return digest(self.name, self.corpus.fingerprint(), self.sizes, self.sentences, *self.directions, *heard)

    # -- truth -----------------------------------------------------------------------------------------------------

    def meanings(self, split: Split, index: int) -> tuple[tuple[Meaning, ...], Meaning]:
        """What the sentences of a paragraph say, in their order, and what its headline says."""
        document, headline = self._rows(split, index // _BLOCK)[index % _BLOCK]
        read = [Meaning.read(row, self.corpus.concepts) for row in (*document, headline)]
        return tuple(read[:-1]), read[-1]

    def text(self, language: str, split: Split, index: int) -> tuple[str, str]:
        """Paragraph and headline in one language."""
        return self._texts(language, split, index // _BLOCK)[index % _BLOCK]

    # -- blocks ----------------------------------------------------------------------------------------------------

    def _say(self, language: str, split: Split, block: int) -> list[tuple[str, str]]:
        say = self.corpus.language(language).say
        return [
            (" ".join(f"{say(row)}." for row in document), f"{say(headline)}.")
            for document, headline in self._rows(split, block)
        ]

    def _draw(self, split: Split, block: int) -> list[tuple[list[list[int]], list[int]]]:
        """The documents of a block, of meanings drawn for it."""
        pool = self._sampler.block(split, block, _POOL, _STREAM)
        subject = pool[:, m.SUBJECT + m.NOUN]
        generator = np.random.default_rng([self._sampler.seed, SPLITS.index(split), _STREAM, block, 1])
        drawn: list[tuple[list[list[int]], list[int]]] = []
        while len(drawn) < _BLOCK:
            order = np.argsort(generator.random(_POOL))
            first = order[0]
            partners = order[1:][subject[order[1:]] == subject[first]]
            # One sentence of each other figure, the first that comes.
            others = order[np.sort(np.unique(subject[order], return_index=True)[1])]
            others = others[subject[others] != subject[first]][: self.sentences - 2]
            if not len(partners):
                continue
            if len(others) < self.sentences - 2:
                raise UserError(
                    f"headlines: a paragraph of {self.sentences} sentences needs as many figures as that less one: the "
                    "concepts have fewer. Ask for fewer sentences."
                )
            chosen = np.array([first, partners[0], *others])
            chosen = chosen[np.argsort(generator.random(len(chosen)))]
            lead = chosen[subject[chosen] == subject[first]][0]
            drawn.append((pool[chosen].tolist(), _headline(pool[lead]).tolist()))
        return drawn


def _own_parameters() -> dict[str, Parameter]:
    return {name: found for name, found in signature(Headlines).parameters.items() if name != "corpus"}


def _headline(row: m.Rows) -> m.Rows:
    """Who does what to whom, and nothing else."""
    core = np.zeros_like(row)
    for column in (m.VERB, m.TENSE, m.NEGATIVE):
        core[column] = row[column]
    for start in (m.SUBJECT, m.OBJECT, m.RECIPIENT):
        core[start + m.NOUN] = row[start + m.NOUN]
        core[start + m.COUNT] = min(row[start + m.COUNT], 1)  # five dogs are dogs
    return core
