"""Languages by their codes, and directions of translation from one into another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from moekit.errors import UserError, nearest

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_@.]*")


class UnservedDirectionError(UserError):
    """A direction is wanted that is not among those of the data.

    Attributes:
        available: the directions that the data have.
    """

    def __init__(self, message: str, available: Iterable[Direction] = ()) -> None:
        super().__init__(message)
        self.available = tuple(available)


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
    def parse(cls, text: str | Direction, *, itself: bool = False) -> Direction:
        """Read ``"en-de"``; a `Direction` passes through.

        Args:
            text: The direction as text.
            itself: Whether a language into itself is a direction too, as of examples.

        Raises:
            UserError: if `text` does not name two languages parted by one hyphen; they must differ unless `itself`.
        """
        if isinstance(text, Direction):
            return text
        source, hyphen, target = text.partition("-")
        if not hyphen or "-" in target or not source or not target or (source == target and not itself):
            raise UserError(
                f"a direction must be two different language codes with one hyphen between, as en-de: got {text!r}. "
                "Write the code pt-BR as pt_BR."
            )
        return cls(language_code(source), language_code(target))

    @property
    def reverse(self) -> Direction:
        """The other way round."""
        return Direction(self.target, self.source)


def all_directions(languages: Sequence[str]) -> tuple[Direction, ...]:
    """Every ordered pair of different languages."""
    return tuple(Direction(a, b) for a, b in permutations(languages, 2))


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
        UnservedDirectionError: if one that is wanted is not available.
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
        parsed = tuple(dict.fromkeys(Direction.parse(text, itself=True) for text in wanted))
        for direction in parsed:
            if direction not in chosen:
                raise UnservedDirectionError(
                    f"directions must be among those of the data: got {direction}. "
                    f"{nearest(str(direction), map(str, chosen))}",
                    chosen,
                )
        chosen = parsed
    if not chosen:
        raise UserError("at least one direction is required: got none. Name some in `directions`, or leave it out.")
    return chosen


def languages_of(directions: Sequence[Direction], known: Iterable[str]) -> tuple[str, ...]:
    """Those of the `known` languages that `directions` begin or end in, each once."""
    spoken = {code for direction in directions for code in (direction.source, direction.target)}
    return tuple(dict.fromkeys(code for code in known if code in spoken))
