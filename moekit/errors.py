"""Exceptions that are told in one message, with what to do; and the hint after a wrong name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad data, configuration or checkpoint given by the user.

    The message says what is required, what was got (file and line, or key) and what to do. Command lines print it
    without a traceback and exit with code 2.
    """


class TrainingStoppedError(RuntimeError):
    """Training cannot go on, or runs of a table have failed, and the input is not known to be at fault.

    Command lines print it without a traceback and exit with code 1.
    """


class NonFiniteError(TrainingStoppedError, FloatingPointError):
    """Training has come to numbers that are not finite."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence that helps after a wrong name: the nearest one, if any is near, and all that exist."""
    known = sorted(choices)
    # One wrong letter of two is half of a language code.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5 if len(name) < 4 else 0.6)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}There {'is' if len(known) == 1 else 'are'}: {', '.join(known) or 'none'}."
