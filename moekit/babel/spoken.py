"""What sources of generated languages share: speakers, their grammar, and text that is made when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from moekit.babel import agreement
from moekit.babel.language import Language
from moekit.errors import UserError
from moekit.source import SPLITS, ChoiceQuestion, Source, Split

_T = TypeVar("_T")
_HEARD = 64  # sentences of each language and split
_AGREEMENT = 4  # of draws, beside those of text and other questions


class Blocks(Generic[_T]):
    """What `make` returned for the last `most` keys; unlike `functools.lru_cache` of a method it can be pickled."""

    def __init__(self, make: Callable[..., _T], most: int) -> None:
        self._make, self._most = make, most
        self._made: dict[tuple[Any, ...], _T] = {}

    def __call__(self, *key: Any) -> _T:
        """What belongs to `key`."""
        if key not in self._made:
            self._made[key] = self._make(*key)
            if len(self._made) > self._most:
                del self._made[next(iter(self._made))]
        return self._made[key]


class Spoken(Source):
    """A source whose languages are generated."""

    knows_words = knows_agreement = True
    _speakers: Mapping[str, Language]

    def word_by_word(self, language: str, text: str) -> str | None:
        """English for a text in a language, word by word; see `Language.word_by_word`."""
        speaker = self._speakers.get(language)
        return None if speaker is None else speaker.word_by_word(text)

    def agreement_questions(self, language: str, *, each: int) -> list[ChoiceQuestion]:
        """Held-out sentences, each beside the same one with a form of a word that does not agree.

        See `moekit.babel.agreement.ask`. The wrong form stands nowhere in the place of the right one: it is written
        otherwise, and class, number and all else of the sentence are as they were.

        Raises:
            UserError: an unknown language, or fewer than no questions.
        """
        self.check_language(language)
        if each < 0:
            raise UserError(f"{self.name}: there must be 0 or more questions of each kind of agreement: got {each}.")
        generator = np.random.default_rng([*self._drawn_by(language), _AGREEMENT])
        pairs = agreement.ask(self._speakers[language], self._meanings(language), each, generator)
        found = []
        for pair, second in zip(pairs, generator.random(len(pairs)) < 0.5, strict=True):
            sentences = (pair.wrong, pair.right) if second else (pair.right, pair.wrong)
            found.append(ChoiceQuestion(pair.kind, language, sentences, int(second)))
        return found

    @abstractmethod
    def _drawn_by(self, language: str) -> list[int]:
        """Numbers that a generator of a language begins with: the seed, and that of the language."""

    @abstractmethod
    def _meanings(self, language: str) -> agreement.Meanings:
        """Held-out meanings that a language can say."""

    def _heard(self, size: Callable[[str, Split], int], sentence: Callable[[str, Split, int], str]) -> list[str]:
        """The first sentences of every language and split, by which a changed generator shows in a fingerprint."""
        return [
            "\n".join(sentence(code, split, index) for index in range(min(_HEARD, size(code, split))))
            for code in self.languages
            for split in SPLITS
        ]
