"""Several examples in a row: which share one, by best fit."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of at most `max_length` tokens, as numbers of examples: each into the fullest row that still has room.

    Examples come the longest first, of equal ones the first first; the rows are a function of the lengths alone.

    Args:
        lengths: the tokens of the examples; each from 1 to `max_length`.
        max_length: the tokens of a row.

    Returns:
        Rows, in the order in which they were begun; every example is in one of them.

    Raises:
        ValueError: an example is empty or longer than a row.

    Source: best-fit decreasing, at most 11/9 of the least number of rows (Johnson 1974).

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room and number, by room
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[number]
        if not 1 <= length <= max_length:
            raise ValueError(f"an example must have 1 to {max_length} tokens to be packed: got {length}.")
        at = bisect.bisect_left(open_rows, (length, -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(number)
        if room > length:
            bisect.insort(open_rows, (room - length, row))
    return rows
