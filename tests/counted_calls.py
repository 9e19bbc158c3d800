"""Work in Python as a number of calls, which is the same on every machine at every load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(function: Callable[[], object]) -> int:
    """Calls of Python functions and of functions in C, generators' every item among them, that `function` makes."""
    seen = 0

    def count(frame: FrameType, event: str, value: Any) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen
