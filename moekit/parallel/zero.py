"""Where ZeRO cuts a tensor."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def zero_dimension(shape: Sequence[int], taken: Collection[int], size: int) -> int | None:
    """Which dimension ZeRO divides among `size` ranks: an even one, not `taken` by experts or slices if possible.

    The first dimension may be uneven where it is free. None = there is no way.
    """
    even = [d for d, length in enumerate(shape) if length % size == 0]
    free = [d for d in even if d not in taken]
    if 0 in free:
        return 0
    if free:
        return max(free, key=lambda d: shape[d])
    if even:
        return max(even, key=lambda d: shape[d])
    return None if 0 in taken else 0
