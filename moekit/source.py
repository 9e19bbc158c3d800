"""What a source of text is: languages, directions, and pairs of sentences by split.

Every kind of corpus (generated, files on disk, catalogs of the system) stands behind `Source`; what comes after it
(tokenizer, stores, mixtures, batches) never learns which one it reads.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moekit.errors import UserError, nearest

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_@.]*")


def language_code(text: str, where: str = "") -> str:
    """`text` as a language code: letters, digits, ``_ @ .``; a hyphen (``pt-BR``) becomes an underscore.

    Hyphens are taken: they part the two languages of a direction.

    Raises:
        UserError: if `text` is no such code; `where` (a file, a line) begins the message.
    """
    code = text.strip().replace("-", "_")
    if not _CODE.fullmatch(code):
        place = f"{where}: " if where else ""
        raise UserError(
            f"{place}a language code must begin with a letter and hold letters, digits, '_', '@' or '.': got {text!r}. "
            "Rename it."
        )
    return code


@dataclass(frozen=True, order=True)
class Direction:
    """From one language into another; written ``en-de``."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"

    @classmethod
    def parse(cls, text: str | Direction) -> Direction:
        """Read ``"en-de"``; a `Direction` passes through.

        Raises:
            UserError: if `text` does not name two different languages parted by one hyphen.
        """
        if isinstance(text, Direction):
            return text
        source, hyphen, target = text.partition("-")
        if not hyphen or "-" in target or not source or not target or source == target:
            raise UserError(
                f"a direction must be two different language codes with one hyphen between, as en-de: got {text!r}. "
                "Write the code pt-BR as pt_BR."
            )
        return cls(language_code(source), language_code(target))

    @property
    def reverse(self) -> Direction:
        """The other way round."""
        return Direction(self.target, self.source)


def all_directions(languages: Sequence[str], pivot: str | None = None) -> tuple[Direction, ...]:
    """Every ordered pair of different languages; with a `pivot`, those that begin or end in it."""
    return tuple(Direction(a, b) for a in languages for b in languages if a != b and (pivot is None or pivot in (a, b)))


def choose_directions(
    available: Sequence[Direction],
    *,
    pivot: str | None = None,
    wanted: Sequence[str | Direction] | None = None,
) -> tuple[Direction, ...]:
    """The directions a source shall serve, out of those it could.

    Args:
        available: what the data allow.
        pivot: keep only directions that begin or end in this language.
        wanted: keep only these, in this order.

    Raises:
        UserError: if a name is unknown or nothing is left.
    """
    chosen = tuple(available)
    if pivot is not None:
        languages = {code for direction in available for code in (direction.source, direction.target)}
        if pivot not in languages:
            raise UserError(f"pivot must be a language of the data: got {pivot!r}. {nearest(pivot, languages)}")
        chosen = tuple(d for d in chosen if pivot in (d.source, d.target))
    if wanted is not None:
        if isinstance(wanted, str):
            raise UserError(f"directions must be a list: got the text {wanted!r}. Write [{wanted}].")
        parsed = tuple(dict.fromkeys(Direction.parse(text) for text in wanted))
        for direction in parsed:
            if direction not in chosen:
                raise UserError(
                    f"directions must be among those of the data: got {direction}. "
                    f"{nearest(str(direction), map(str, chosen))}"
                )
        chosen = parsed
    if not chosen:
        raise UserError("at least one direction is required: got none. Name some in `directions`, or leave it out.")
    return chosen


class Source(ABC):
    """A corpus: pairs of sentences by direction and split, and sentences by language.

    A subclass sets the three attributes and writes `parallel` and `fingerprint`; `monolingual` follows from them.

    Attributes:
        name: the kind, as `open_source` knows it.
        languages: codes, in an order that does not change from run to run.
        directions: everything that `parallel` serves, both ways where both are asked for.
    """

    name: str
    languages: tuple[str, ...]
    directions: tuple[Direction, ...]

    @abstractmethod
    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs (source, target) of one direction; empty where the corpus has none in this split.

        Raises:
            UserError: if the source does not serve `direction`, or `split` is none of train, valid, test.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of content and settings: equal digests promise equal answers of every method."""

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of one language: by default its side of the parallel data, each once, in order of appearance."""
        self.check_language(language)
        self.check_split(split)
        seen: dict[str, None] = {}
        for direction in self.directions:
            if direction.source == language:
                seen.update(dict.fromkeys(pair[0] for pair in self.parallel(direction, split)))
            elif direction.target == language and direction.reverse not in self.directions:
                seen.update(dict.fromkeys(pair[1] for pair in self.parallel(direction, split)))
        return list(seen)

    def check_language(self, language: str) -> None:
        """Raise UserError, with the nearest name, if the source does not hold `language`."""
        if language not in self.languages:
            raise UserError(
                f"{self.name}: the language must be one of the data: got {language!r}. "
                f"{nearest(language, self.languages)}"
            )

    def check_direction(self, direction: Direction) -> None:
        """Raise UserError, with the nearest name, if the source does not serve `direction`."""
        if direction not in self.directions:
            self.check_language(direction.source)
            self.check_language(direction.target)
            raise UserError(
                f"{self.name}: the direction must be one that the source serves: got {direction}. "
                f"{nearest(str(direction), map(str, self.directions))}"
            )

    def check_split(self, split: Split) -> Split:
        """`split` itself, or UserError if it is none of train, valid, test."""
        if split not in SPLITS:
            raise UserError(f"{self.name}: the split must be one of {', '.join(SPLITS)}: got {split!r}.")
        return split

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(languages={', '.join(self.languages)}; {len(self.directions)} direction"
            f"{'' if len(self.directions) == 1 else 's'})"
        )


def digest(*parts: object) -> str:
    """Hex digest of the text forms of `parts`, kept apart from each other; bytes are taken as they are."""
    state = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
