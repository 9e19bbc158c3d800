"""The text that a reader sees in a terminal and on a page."""

import io
import re
from pathlib import Path

from rich.console import Console

from moekit.report import terminal_summary


def screen(run: Path) -> str:
    file = io.StringIO()
    terminal_summary(run, Console(file=file, width=80, force_terminal=False, color_system=None))
    return file.getvalue()


def words(html: str) -> str:
    """Text of a page, without styles and tags."""
    body = re.sub("<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub("<[^>]*>", " ", body).split())
