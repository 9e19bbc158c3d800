"""Standard output that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def discard(stream: Any) -> None:
    """Let what is still to be printed go nowhere: the interpreter flushes standard output when it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Lasting:
    """A stream that goes quiet where nobody reads it any more: ``| head``, a terminal that was closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):  # ValueError: it is closed
            discard(self._stream)
        return None

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, work goes on although what it prints can no longer be written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Lasting(stream) for stream in before)
    try:
        yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.stdout, sys.stderr = before
