"""What a terminal is sent: text as text. Nothing in a path, a name or a sample moves the cursor or becomes a style."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but line feed and tab, among them ESC, BEL and CR; what turns the direction of writing; separators
# of lines and paragraphs; bytes of a path that are no text.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""`text` with the characters that would act on a terminal as escapes, such as ``\x1b``."""
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def write_data(text: str) -> None:
    """Write text for files and other programs to standard output, in UTF-8 whatever the encoding of the terminal.

    What UTF-8 cannot hold, such as half of a surrogate pair in a sample, becomes a question mark.
    """
    write_encoded(text.encode("utf-8", "replace"))


def write_encoded(data: bytes) -> None:
    """Write text in UTF-8 to standard output, behind all that was written before."""
    binary = getattr(sys.stdout, "buffer", None)
    sys.stdout.flush()
    if binary is None:  # a stand-in, as in notebooks
        sys.stdout.write(data.decode("utf-8"))
    else:
        binary.write(data)
    sys.stdout.flush()


class _VisibleFormatter(logging.Formatter):
    """A formatter of log records that sends them through `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def visible_remarks() -> Iterator[None]:
    """Inside, warnings and log records that nobody handles reach standard error through `visible`."""
    before, last = warnings.formatwarning, logging.lastResort

    def formatted(*given: Any, **more: Any) -> str:
        return visible(before(*given, **more))

    warnings.formatwarning = formatted
    formatter = None if last is None else last.formatter
    if last is not None:
        last.setFormatter(_VisibleFormatter())
    try:
        yield
    finally:
        warnings.formatwarning = before
        if last is not None:
            last.setFormatter(formatter)


class Terminal(Console):
    """A console that prints strings as they are: `rich.text.Text` brings styles, brackets in a string do not.

    Whatever is printed goes through `visible`, and characters that the terminal's encoding lacks become escapes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's; of strings also those characters are shown that it would drop."""
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, all text visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self._shown(segment.text))

    def _shown(self, text: str) -> str:
        return visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
