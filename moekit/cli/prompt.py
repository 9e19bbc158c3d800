"""A trained run at the terminal: a line is read, and answered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moekit.data.lines import one_line, require_plain
from moekit.errors import UserError
from moekit.terminal import visible

if TYPE_CHECKING:
    from moekit.runs.writer import Writer


def converse(writer: Writer, source: str | None, target: str | None, n_best: int | None = None) -> None:
    """Answer lines until an empty one, or the end of the input (Ctrl-D).

    Languages that are not given are asked for, unless there is one alone. What is wrong with a line is said of it, and
    the next one is read. With `n_best` the best texts are shown below each other, each behind its score.

    Raises:
        UserError: a language is unknown, or more texts are wanted than the beam is wide.
    """
    if n_best is not None:
        writer.require_n_best(n_best)
    if _on_screen():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited then
    if source is None:
        source = _chosen("from", writer.sources)
    if target is None and writer.targets and source is not None:
        target = _chosen("to", writer.targets_of(source))
    if source is None or (target is None and writer.targets):
        return
    source, target = writer.require_languages(source, target)
    what = f"{source} to {target}" if target else source
    _say(f"{writer.title}, {what}. One line at a time; an empty line or Ctrl-D ends it.")
    number = 0
    while (line := _asked("> ")) is not None and line.strip():
        number += 1
        try:
            require_plain(line, f"line {number}")
            written = writer.write([line], source, target, n_best=n_best, first_number=number - 1)
        except UserError as error:
            _say(f"error: {error}")
            continue
        if warning := writer.warning([number - 1 for _ in written.cut], "standard input"):
            _say(warning)
        answers = [one_line(written.texts[0])]
        if n_best is not None:
            answers = [f"{found.score:.6g}\t{one_line(found.text)}" for found in written.hypotheses[0]]
        for answer in answers:
            print(visible(answer) if _on_screen() else answer, flush=True)


def _chosen(word: str, languages: Sequence[str]) -> str | None:
    """A language; None = the input has ended."""
    if len(languages) == 1:
        return languages[0]
    while (answer := _asked(f"{word} ({', '.join(languages)}): ")) is not None and answer.strip() not in languages:
        pass
    return None if answer is None else answer.strip()


def _asked(prompt: str) -> str | None:
    """A line; None = the input has ended."""
    try:
        if _on_screen():
            return input(prompt)
        # `input` would write the prompt into the answers.
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except EOFError:
        print()
        return None
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input: text must be UTF-8: got the byte 0x{error.object[error.start]:02x}."
        ) from None
    return line.rstrip("\r\n") if line else None


def _on_screen() -> bool:
    """Whether answers go to a terminal, too."""
    return sys.stdout is not None and sys.stdout.isatty()


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
