"""Salient words, those that carry knowledge: found in text as sequences of pieces, and named by a user's file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moekit.data.lines import read_lines
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.source import ChoiceQuestion, Direction, Information, Source, Split, digest


class WordPlaces(NamedTuple):
    """Where salient words stand in some texts, in the order of the text; no two overlap.

    Attributes:
        start: Int64[M], place of the first token of each among all tokens of the texts.
        length: Int64[M], its tokens.
        row: Int64[M], the text in which it stands.
        number: Int64[B], how many each text has.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    row: NDArray[np.int64]
    number: NDArray[np.int64]


class SalientWords:
    """The salient words of several languages, as a tokenizer cuts them into pieces.

    SentencePiece cuts each word without a look at its neighbours, so a word is always the same sequence of pieces. The
    sequences are kept as a prefix tree, level by level, and all places of a text walk down it together.

    Args:
        words: by language. One may be several words with spaces between, such as a name.
        tokenizer: cuts them. Words with a character that it does not know are left out, as all such look alike.

    Attributes:
        number: how many sequences are looked for.
    """

    def __init__(self, words: Mapping[str, Iterable[str]], tokenizer: Tokenizer) -> None:
        rows: list[list[int]] = []
        roots: list[int] = []
        for language, own in words.items():
            known = [
                ids for ids in tokenizer.encode_batch(sorted(own)) if min(ids, default=0) >= tokenizer.first_text_id
            ]
            rows += known
            roots += [tokenizer.language_id(language)] * len(known)
        self.number = len(rows)
        self._vocab_size, self._continues = tokenizer.vocab_size, tokenizer.continues_word
        # Of each level: sorted keys of its nodes, made of the parent's number and a token; and whether a word ends.
        self._levels: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
        text, node = Ragged.of(rows), np.array(roots, dtype=np.int64)
        start, length = text.starts, text.lengths
        for depth in range(int(length.max(initial=0))):
            longer = length > depth
            start, length, node = start[longer], length[longer], node[longer]
            keys, node = np.unique(node * self._vocab_size + text.tokens[start + depth], return_inverse=True)
            ends = np.zeros(len(keys), dtype=bool)
            ends[node[length == depth + 1]] = True
            self._levels.append((keys, ends))

    def find(self, text: Ragged, languages: NDArray[np.int64]) -> WordPlaces:
        """The salient words of some texts.

        A word ends where the next piece begins another, or is no letter and no digit, or the text ends. The longest
        that begins at a place counts. One that begins inside another does not.

        Args:
            text: B texts without special tokens.
            languages: Int64[B], their ids.
        """
        tokens, ends = text.tokens, np.repeat(np.cumsum(text.lengths), text.lengths)
        free = np.ones(len(tokens) + 1, dtype=bool)  # whether a word may end before the token
        free[:-1] = ~self._continues[tokens]
        free[text.starts] = True
        longest = np.zeros(len(tokens), dtype=np.int64)
        place, node = np.arange(len(tokens)), np.repeat(languages, text.lengths)
        for depth, (keys, accepts) in enumerate(self._levels):
            inside = place + depth < ends[place]
            place, node = place[inside], node[inside]
            key = node * self._vocab_size + tokens[place + depth]
            child = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            there = keys[child] == key
            place, node = place[there], child[there]
            whole = place[accepts[node] & free[place + depth + 1]]
            longest[whole] = depth + 1
        start = np.flatnonzero(longest)
        reached = np.maximum.accumulate(start + longest[start])
        start = start[start >= np.concatenate([[0], reached[:-1]])] if len(start) else start
        row = text.row[start]
        return WordPlaces(start, longest[start], row, np.bincount(row, minlength=len(text)).astype(np.int64))


class WithSalient(Source):
    """A source whose salient words are a user's; all else is the source's own.

    Args:
        source: the text.
        words: the same for all languages.
    """

    def __init__(self, source: Source, words: frozenset[str]) -> None:
        self.source, self.words = source, words
        self.name, self.languages, self.directions = source.name, source.languages, source.directions

    @classmethod
    def read(cls, source: Source, path: str) -> WithSalient:
        """Words from a file, one a line; empty lines, and spaces around a word, do not count.

        Raises:
            UserError: it cannot be read, or names no word.
        """
        if Path(path).is_dir():
            raise UserError(f"data.salient must be a file with one word a line, or source: got the folder {path}.")
        words = frozenset(" ".join(line.split()) for line in read_lines(path, "data.salient")) - {""}
        if not words:
            raise UserError(f"data.salient must name at least one word, one a line: {path} has none. Write some in it.")
        return cls(source, words)

    def salient(self, language: str) -> frozenset[str] | None:
        """The user's words."""
        self.check_language(language)
        return self.words

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """The source's."""
        return self.source.parallel(direction, split)

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """The source's."""
        return self.source.monolingual(language, split)

    def fingerprint(self) -> str:
        """Digest of the source's and of the words."""
        return digest("salient", self.source.fingerprint(), *sorted(self.words))

    def prepare(self, cache: Path, *, progress: bool = True) -> None:
        """Prepare the source."""
        self.source.prepare(cache, progress=progress)

    def word_by_word(self, language: str, text: str) -> str | None:
        """The source's."""
        return self.source.word_by_word(language, text)

    def questions(self, language: str, *, each: int, choices: int) -> list[ChoiceQuestion]:
        """The source's."""
        return self.source.questions(language, each=each, choices=choices)

    def information(self, language: str, split: Split) -> Information | None:
        """The source's."""
        return self.source.information(language, split)


def require_use(salient: str | None, share: float, tasks: Mapping[str, Any]) -> None:
    """Make sure that what is said of salient words is used.

    Args:
        salient: where they come from; None = nothing is said.
        share: how many of them are cut out; 1 = nothing is said.
        tasks: of the run, by name (`moekit.tasks.Task`).

    Raises:
        UserError: there are words, and no task seeks any; or a share, and no words.
    """
    if salient is not None and not any(task.seeks_words for task in tasks.values()):
        raise UserError(
            f"data.salient says which words span corruption cuts out, and no task is span corruption: got "
            f"{', '.join(tasks)}. Leave data.salient out."
        )
    if salient is None and share != 1:
        raise UserError(
            f"data.salient_share is a share of the salient words, of which there are none: got {share:g}. "
            "Give data.salient, or leave the share out."
        )
