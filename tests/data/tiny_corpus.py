"""A corpus small enough to read, for tests of everything that comes after the sources."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moekit.data.store import TokenStore
from moekit.source import Direction, Source, Split, all_directions, digest

ONSETS = {"aa": "bdg", "bb": "klm", "cc": "prs"}
SIZES: dict[Split, int] = {"train": 400, "valid": 40, "test": 30}


def sentences(language: str, split: Split, count: int, seed: int = 0) -> list[str]:
    """Aligned across languages: sentence i has the same word numbers in each, spelled its own way."""
    numbers = random.Random(f"{split}-{seed}")
    lexicon = random.Random(language)
    words = ["".join(lexicon.choice(ONSETS[language]) + lexicon.choice("aeiou") for _ in range(3)) for _ in range(90)]
    lines = []
    for _ in range(count):
        length = min(40, 1 + int(numbers.lognormvariate(2.0, 0.55)))
        lines.append(" ".join(words[min(89, int(numbers.expovariate(0.05)))] for _ in range(length)))
    return lines


class TinySource(Source):
    """Three languages, all six directions, aligned; `scale` multiplies the number of training sentences."""

    name = "tiny"

    def __init__(self, languages: Sequence[str] = ("aa", "bb", "cc"), scale: float = 1.0, seed: int = 0) -> None:
        self.languages = tuple(languages)
        self.directions = all_directions(self.languages)
        self.scale, self.seed = scale, seed

    def _lines(self, language: str, split: Split) -> list[str]:
        count = round(SIZES[split] * (self.scale if split == "train" else 1))
        return sentences(language, split, count, self.seed)

    def parallel(self, direction: Direction, split: Split) -> list[tuple[str, str]]:
        return list(zip(self._lines(direction.source, split), self._lines(direction.target, split), strict=True))

    def monolingual(self, language: str, split: Split) -> list[str]:
        return self._lines(language, split)

    def fingerprint(self) -> str:
        return digest(self.languages, self.scale, self.seed)


def stored(store: TokenStore, section: str) -> list[list[int]]:
    """Each sentence of a section, in order."""
    return [row.tolist() for row in store.read(store.starts(section), store.lengths(section))]
