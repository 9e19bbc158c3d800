"""Rows of tokens: taken for their assignments, and added up again, in an order that does not change between runs.

CUDA's scattered addition adds in any order. Of two summands that makes no difference; of three and more the last bits
change from run to run, and a resumed run is no longer the one that was interrupted. There a form is taken that sorts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.functional.ordered_sums import sum_by_index


def take(x: Tensor, index: Tensor, choices: int | None) -> Tensor:
    """Rows `index` Int64[R] of ``x`` Float[T, D]; their gradients are added up in a fixed order.

    Each row is there at most `choices` times; None = any number.
    """
    return x[index] if _must_sort(x, choices) else x.index_select(0, index)  # the backward of an index sorts


def add(rows: Tensor, index: Tensor, size: int, choices: int | None) -> Tensor:
    """Float[size, D]: the sum of those ``rows`` Float[R, D] that have each `index` in 0..size-1, in a fixed order.

    Each index is there at most `choices` times; None = any number.
    """
    if _must_sort(rows, choices):
        return sum_by_index(rows, index, size)
    return rows.new_zeros(size, rows.shape[1]).index_add_(0, index, rows)


def _must_sort(rows: Tensor, choices: int | None) -> bool:
    return rows.device.type == "cuda" and (choices is None or choices > 2)
