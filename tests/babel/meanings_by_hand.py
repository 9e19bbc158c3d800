"""Meanings of the generated corpus, written cell by cell."""

from moekit.babel import Babel
from moekit.babel import meaning as m


def row(**cells: int) -> list[int]:
    """A meaning by hand, with every column that is not named at 0; the verb is 1 unless named."""
    cells.setdefault("VERB", 1)
    values = [0] * m.WIDTH
    for name, value in cells.items():
        values[getattr(m, name)] = value
    return values


def noun(babel: Babel, gloss: str) -> int:
    return [n.gloss for n in babel.concepts.nouns].index(gloss) + 1


def verb(babel: Babel, gloss: str) -> int:
    return [v.gloss for v in babel.concepts.verbs].index(gloss) + 1
