"""Examples as files hold them: texts, prompts with their completion, conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moekit.data.keyed import key, permute
from moekit.data.lines import read_lines
from moekit.data.sources.files import read_json
from moekit.errors import UserError
from moekit.source import digest

HELD_OUT = 0.05
"""The share of a file's examples that is held out where nothing else is said."""
SEED = 1
"""The seed by which it is drawn where nothing else is said."""

_KINDS = '{"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_NUMBERED = 3  # keys that a message shows


@dataclass(frozen=True)
class PlainText:
    """A text, of which every token is learned."""

    where: str
    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, which is learned."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``, of which the assistant's are learned.

    Attributes:
        where: file and line.
        messages: at least one of them is the assistant's and `says_something`. Content may be None where there are
            ``tool_calls``.
        tools: what the chat template is given as ``tools``; None = none.
    """

    where: str
    messages: tuple[Mapping[str, Any], ...]
    tools: Any = None


Example = PlainText | Completion | Conversation


def read_examples(name: str, source: Literal["jsonl", "text"], option: str = "--data.path") -> list[Example]:
    """The examples of a file, in its order. Empty lines are passed over, and so are other keys of objects.

    Args:
        name: the file; - = standard input.
        source: "jsonl" = an object a line, "text" = a text a line.
        option: the option that names the file, for what is said of it.

    Raises:
        UserError: naming file and line: it cannot be read, a line is of none of the kinds, or there is no example.
    """
    found: list[Example] = []
    for number, line in enumerate(read_lines(name, option), start=1):
        where = f"{name}, line {number}"
        if line.strip():
            found.append(PlainText(where, line) if source == "text" else _parsed(read_json(line, where), where))
    if not found:
        raise UserError(f"{name} must hold at least one example: got none. Fill it, or give another file.")
    return found


def divided(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, a function of their number, share and seed.

    Args:
        examples: two or more.
        share: that which is held out; at least one example is, and one is left.
        seed: random seed of the choice.
    """
    count = min(len(examples) - 1, max(1, round(len(examples) * share)))
    places = permute(np.arange(len(examples)), len(examples), key(seed, "held out"))
    return (
        [example for example, place in zip(examples, places, strict=True) if place >= count],
        [example for example, place in zip(examples, places, strict=True) if place < count],
    )


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has text or calls tools."""
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def fingerprint(examples: Sequence[Example]) -> str:
    """Digest of what examples say, wherever they are from."""
    return digest(*(json.dumps([type(e).__name__, *_content(e)], sort_keys=True) for e in examples))


def _content(example: Example) -> Iterator[Any]:
    for name, value in vars(example).items():
        if name != "where":
            yield [dict(message) for message in value] if name == "messages" else value


def _parsed(row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{where}: the line must be an object such as {_KINDS}: got {type(row).__name__}.")
    kinds = [name for name in ("messages", "completion", "text") if name in row]
    if len(kinds) != 1 or ("prompt" in row) != (kinds == ["completion"]):
        got = ", ".join(list(row)[:_NUMBERED]) or "none"
        raise UserError(f"{where}: the line must have the keys of one kind, as {_KINDS}: got the keys {got}.")
    if kinds == ["messages"]:
        return _conversation(row, where)
    for name in ("prompt", "completion", "text"):
        if name in row and not isinstance(row[name], str):
            raise UserError(f"{where}: {name} must be text: got {type(row[name]).__name__}.")
    if not row[kinds[0]].strip():
        raise UserError(f"{where}: {kinds[0]} must not be empty. Fill it, or remove the line.")
    if kinds == ["text"]:
        return PlainText(where, row["text"])
    return Completion(where, row["prompt"], row["completion"])


def _conversation(row: Mapping[str, Any], where: str) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list of at least one message: got {str(messages)[:60]!r}.")
    for number, message in enumerate(messages, start=1):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str if not message.get("tool_calls") else str | None)
        ):
            raise UserError(
                f'{where}: message {number} must be an object with texts role and content, as {{"role": "user", '
                f'"content": "..."}}: got {json.dumps(message)[:80]}'
            )
    if not any(message["role"] == "assistant" and says_something(message) for message in messages):
        raise UserError(f"{where}: messages must have one of the role assistant, which is what is learned: got none.")
    return Conversation(where, tuple(messages), row.get("tools"))
