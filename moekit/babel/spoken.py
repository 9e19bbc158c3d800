"""What sources of generated languages share: speakers, and text that is made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from moekit.babel.language import Language
from moekit.source import SPLITS, Source, Split

_T = TypeVar("_T")
_HEARD = 64  # sentences of each language and split


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

    knows_words = True
    _speakers: Mapping[str, Language]

    def word_by_word(self, language: str, text: str) -> str | None:
        """English for a text in a language, word by word; see `Language.word_by_word`."""
        speaker = self._speakers.get(language)
        return None if speaker is None else speaker.word_by_word(text)

    def _heard(self, size: Callable[[str, Split], int], sentence: Callable[[str, Split, int], str]) -> list[str]:
        """The first sentences of every language and split, by which a changed generator shows in a fingerprint."""
        return [
            "\n".join(sentence(code, split, index) for index in range(min(_HEARD, size(code, split))))
            for code in self.languages
            for split in SPLITS
        ]
