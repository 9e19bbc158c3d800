"""A kind of file that is damaged, and what comes of the damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import BYTES, Damage


@dataclass(frozen=True)
class Kind:
    """A kind of file or folder.

    Attributes:
        make: writes one that is right, at this place.
        read: reads it all; what it returns is compared with what the right one gave.
        damage: what is done to the bytes of one of its files.
        known: whether changed bytes are known: content is right then, or refused. Else nothing but crashes counts.
        only: which files are damaged.
        digested: whether what is read begins with a digest, which must be another one where the content is.
        least: the share of damaged ones that must be refused, since else the damage would be none.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    damage: Sequence[Damage] = BYTES
    known: bool = True
    digested: bool = False
    least: float = 0.1
    only: str = "*"


@dataclass
class Outcome:
    """What came of damage: numbers by what happened, and each fault with its seed."""

    counts: Counter[str]
    faults: list[str]
