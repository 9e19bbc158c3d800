"""Text aligned line by line, whatever it was stored in: what moses, jsonl, tsv and gettext have in common.

The parts of a corpus are `AlignedBlock`s: one split, two or more languages, line `i` of one translating line `i` of the
others. A direction is served from every block that holds both its languages.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from moekit.errors import UserError
from moekit.source import Direction, Source, Split, choose_directions, digest, languages_of

_ENGLISH = ("en", "eng", "eng_Latn")


@dataclass(frozen=True)
class AlignedBlock:
    """Lines that translate each other.

    Attributes:
        split: train, valid or test.
        columns: lines by language, equally many; a blank line means that the language lacks this sentence.
        files: what holds each language, for messages.
        digest: of the content.
        first_line: number of the line at which entry 0 stands.
    """

    split: Split
    columns: Mapping[str, list[str]]
    files: Mapping[str, str]
    digest: str
    first_line: int = 1

    def where(self, language: str, index: int) -> str:
        """File and line of an entry."""
        return f"{self.files[language]}, line {index + self.first_line}"


class AlignedSource(Source):
    """A source made of blocks; a subclass reads them from its files and has a `name`.

    Args:
        blocks: the content.
        pivot: "auto" = where a block holds more than two languages and English, only directions from and into English;
            a language = only directions from and into it; None = all.
        directions: only these, as "en-de"; they may be any that the blocks hold.
        strict: an empty line is an error; else the pairs it belongs to are dropped, with one warning.

    Raises:
        UserError: on empty lines if `strict`, on unknown names, if no two languages meet in training.
    """

    def __init__(
        self,
        blocks: Sequence[AlignedBlock],
        *,
        pivot: str | None = "auto",
        directions: Sequence[str | Direction] | None = None,
        strict: bool = False,
    ) -> None:
        self._blocks = tuple(blocks)
        self._settings = (pivot, None if directions is None else tuple(map(str, directions)), strict)
        self._check_blanks(strict)
        automatic = pivot == "auto"
        served = [block for block in self._blocks if directions is not None or block.split == "train"] or self._blocks
        pairs = _pairs(served, english_only=automatic and directions is None)
        self.directions = choose_directions(pairs, pivot=None if automatic else pivot, wanted=directions)
        self.languages = languages_of(self.directions, (code for block in self._blocks for code in block.columns))

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs of one direction, in the order of the files; pairs with an empty side are left out."""
        self.check_direction(direction)
        self.check_split(split)
        return [
            pair
            for block in self._blocks
            if block.split == split and {direction.source, direction.target} <= block.columns.keys()
            for pair in zip(block.columns[direction.source], block.columns[direction.target], strict=True)
            if all(pair)
        ]

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Every sentence of a language in a split, once, in order of appearance."""
        self.check_language(language)
        self.check_split(split)
        lines: dict[str, None] = {}
        for block in self._blocks:
            if block.split == split and language in block.columns:
                lines.update(dict.fromkeys(block.columns[language]))
        lines.pop("", None)
        return list(lines)

    def fingerprint(self) -> str:
        """Digest of all content and the settings."""
        parts = [f"{block.split}:{','.join(block.columns)}:{block.digest}" for block in self._blocks]
        return digest(self.name, *self._settings, *parts)

    def _check_blanks(self, strict: bool) -> None:
        blank: list[str] = []
        for block in self._blocks:
            for language, lines in block.columns.items():
                if "" in lines:
                    number = lines.count("")
                    if number == len(lines):
                        raise UserError(
                            f"{block.where(language, 0)}: a file must hold text in every language: got only empty "
                            f"lines for {language!r}. Fill it or remove it."
                        )
                    blank.append(f"{block.where(language, lines.index(''))} ({number} for {language})")
        if not blank:
            return
        shown = "; ".join(blank[:3]) + (f"; and {len(blank) - 3} more places" if len(blank) > 3 else "")
        if strict:
            raise UserError(
                f"{self.name}: no line may be empty: first at {shown}. Fill them, or drop their pairs with "
                "strict=False."
            )
        warnings.warn(
            f"{self.name}: empty lines, whose pairs are dropped; first at {shown}. strict=True makes this an error.",
            stacklevel=4,
        )


def digest_of(content: str, fields: Mapping[str, object]) -> str:
    """The digest of a file's content and of which of its fields were read.

    Args:
        content: digest of the file.
        fields: by language; those that the code of the language tells are left out.
    """
    untold = [f"{code}={field}" for code, field in fields.items() if str(field).replace("-", "_") != code]
    return digest(content, *untold) if untold else content


def _pairs(blocks: Sequence[AlignedBlock], *, english_only: bool) -> tuple[Direction, ...]:
    """The directions that the blocks hold, in order of appearance."""
    found: dict[Direction, None] = {}
    for block in blocks:
        english = next((code for code in _ENGLISH if code in block.columns), None)
        pivoted = english_only and len(block.columns) > 2 and english is not None
        for a, b in combinations(block.columns, 2):
            if not pivoted or english in (a, b):
                found.setdefault(Direction(a, b))
                found.setdefault(Direction(b, a))
    return tuple(found)
