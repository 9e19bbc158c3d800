"""`TextStream`: sentences that are read anew each time somebody walks through them, and never held."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

_SENTENCES = 1 << 13
_CHARACTERS = 1 << 22


class TextStream(Sequence[str]):
    """Sentences that are not in memory.

    To walk through them is cheap, and to ask for one of them walks to it.

    Args:
        walk: reads them from the first on.
        count: how many there are.
        identity: of their content: of two streams with the same one all sentences are the same.
    """

    def __init__(self, walk: Callable[[], Iterator[str]], count: int, identity: str) -> None:
        self._walk, self._count, self.identity = walk, count, identity

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return self._walk()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        chosen = range(self._count)[index]
        if isinstance(chosen, int):
            return next(itertools.islice(self._walk(), chosen, None))
        if chosen.step < 0:
            return self[chosen.start + (len(chosen) - 1) * chosen.step : chosen.start + 1 : -chosen.step][::-1]
        return list(itertools.islice(self._walk(), chosen.start, max(chosen.start, chosen.stop), chosen.step))


def in_chunks(
    sentences: Iterable[str], most: int = _SENTENCES, characters: int | None = _CHARACTERS
) -> Iterator[list[str]]:
    """Some sentences at a time: at most so many, and no more once they have so many characters."""
    chunk: list[str] = []
    size = 0
    for sentence in sentences:
        chunk.append(sentence)
        size += len(sentence)
        if len(chunk) == most or (characters is not None and size >= characters):
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
