"""Words that pages and messages share: numbers with their nouns, and cells of tables."""

from __future__ import annotations


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and what it counts.

    Args:
        number: at least 0.
        one: the noun of one.
        several: that of several; None = with an s.

    >>> counted(1, "example"), counted(1200, "process", "processes")
    ('1 example', '1,200 processes')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def table_cell(text: str) -> str:
    r"""Text as a cell of a table in Markdown.

    >>> table_cell("one | two\nthree")
    'one \\| two three'
    """
    return " ".join(text.split()).replace("|", "\\|")
