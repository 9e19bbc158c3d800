"""What is asked of a run: the body of a request, its bounds, and why it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moekit.data.lines import require_plain
from moekit.errors import UserError, nearest
from moekit.runs.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a request and of its answer.

    Attributes:
        max_lines: most lines of a request.
        max_characters: most characters of a line.
        max_waiting: most requests that wait while one is answered.
        max_seconds: most seconds that an answer takes, the waiting included.
        max_bytes: most bytes of a request's body.
        request_seconds: most seconds until a request has arrived.

    Raises:
        UserError: a bound that lets nothing through.
    """

    max_lines: int = 100
    max_characters: int = 5_000
    max_waiting: int = 8
    max_seconds: float = 60.0
    max_bytes: int = 1 << 20
    request_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("max_lines", 1), ("max_characters", 1), ("max_waiting", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}: got {getattr(self, name)}.")
        if not 0 < self.max_seconds < math.inf:
            raise UserError(f"--max_seconds must be a positive number of seconds: got {self.max_seconds}.")


class RefusedError(Exception):
    """A request that is not answered with text.

    Args:
        status: of the response.
        message: what is required, what was got and what to do.
        headers: more headers of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


@dataclass(frozen=True)
class Request:
    """Lines to write for.

    Attributes:
        lines: one sentence or prompt each.
        source: their language.
        target: language wanted; None where text is continued.
        n_best: texts wanted of each line, with their scores; None = the best one alone.
    """

    lines: list[str]
    source: str
    target: str | None
    n_best: int | None = None


def parsed(body: bytes, writer: Writer, limits: Limits) -> Request:
    """The request in a body ``{"text": "one sentence or prompt per line", "from": "en", "to": "de"}``.

    A language may be left out where the run has one alone. With ``"n_best": 3`` three texts of each line are wanted.

    Raises:
        RefusedError: 400 or 413, with what is wrong.
    """
    data = _mapping(body)
    known = {"text", "from", "to"} if writer.targets else {"text", "from"}
    for key in data:
        if key not in known | {"n_best"}:
            raise RefusedError(400, f"unknown key {_short(key)}. {nearest(key, known | {'n_best'})}")
    for key in known:
        if not isinstance(data.get(key, ""), str):
            raise RefusedError(400, f"{key} must be a string: got {type(data[key]).__name__}.")
    text = data.get("text", "")
    if not text.strip():
        raise RefusedError(400, "text must not be empty: give one sentence or prompt per line.")
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if len(lines) > limits.max_lines:
        raise RefusedError(413, f"text must have at most {limits.max_lines:,} lines: got {len(lines):,}.")
    for number, line in enumerate(lines, start=1):
        if len(line) > limits.max_characters:
            raise RefusedError(
                413,
                f"text, line {number} must have at most {limits.max_characters:,} characters: got {len(line):,}.",
            )
    try:
        for number, line in enumerate(lines, start=1):
            require_plain(line, f"text, line {number}")
        source = _language(data, "from", writer.sources)
        target = _language(data, "to", writer.targets_of(source)) if writer.targets else None
        writer.require_languages(source, target)
        n_best = _n_best(data, writer)
    except UserError as error:
        raise RefusedError(400, str(error)) from None
    return Request(lines, source, target, n_best)


def _n_best(data: Mapping[str, Any], writer: Writer) -> int | None:
    if "n_best" not in data:
        return None
    wanted = data["n_best"]
    if type(wanted) is not int or not 1 <= wanted <= writer.beam_size:
        got = wanted if type(wanted) is int and abs(wanted) < 10**9 else _kind(wanted)
        raise RefusedError(
            400, f"n_best must be a whole number from 1 to {writer.beam_size}, the width of the beam: got {got}."
        )
    return wanted


def _mapping(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body must be UTF-8: byte {error.start + 1} is not.") from None
    except RecursionError:
        raise RefusedError(400, "the body must be a JSON object of strings: it is nested too deeply.") from None
    except ValueError as error:
        raise RefusedError(400, f"the body must be JSON: {error}.") from None
    if not isinstance(data, dict):
        raise RefusedError(400, f'the body must be a JSON object, such as {{"text": "..."}}: got {_kind(data)}.')
    return data


def _language(data: Mapping[str, str], key: str, languages: tuple[str, ...]) -> str:
    if key in data:
        if not data[key].isprintable() or len(data[key]) > 40:
            raise RefusedError(400, f"{key} must be a language: one of {', '.join(languages)}.")
        return data[key]
    if len(languages) > 1:
        raise RefusedError(400, f"{key} must be a language: one of {', '.join(languages)}. It is missing.")
    return languages[0]


def _kind(data: object) -> str:
    return {list: "an array", str: "a string", type(None): "null"}.get(type(data), f"a {type(data).__name__}")


def _short(key: str) -> str:
    return repr(key if len(key) <= 40 else key[:40] + "...")
