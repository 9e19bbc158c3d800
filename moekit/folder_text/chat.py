"""Conversations as a folder's own chat template writes them, and where in the text the assistant speaks."""

from __future__ import annotations

import datetime
import re
import string
from typing import Any

from moekit.errors import UserError
from moekit.folder_text.examples import Conversation, says_something

Span = tuple[int, int]
"""The first character, and that behind the last one."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "qxzassistantspeaksherezxq"
_TOLD_DATE = (
    "{%- macro strftime_now(format) -%}{%- set said = namespace(text=format) -%}"
    "{%- for directive, value in told_date.items() -%}"
    "{%- set said.text = said.text.replace(directive, value) -%}"
    "{%- endfor -%}{{- said.text -}}{%- endmacro %}\n"
)
"""Before a template, it goes before the function of transformers that asks the clock. What a template is given cannot:
transformers gives it plain data alone. The line that it ends is no part of the text."""


class ChatTemplate:
    """The chat template of a tokenizer.

    What is learned is what the assistant has to write: from the end of the prompt for its turn to the end of the turn,
    the token that ends it included. Where the template marks it (``{% generation %}``), the marks count.

    Args:
        tokenizer: fast, of transformers.
        date: the day that a template is told which writes the date (``strftime_now``), at its first minute; None =
            today, whatever day comes while this lives.
    """

    def __init__(self, tokenizer: Any, date: datetime.date | None = None) -> None:
        self.tokenizer = tokenizer
        self._date = _directives(date or datetime.date.today())

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation, and the assistant's spans in it.

        Raises:
            UserError: naming file and line: the tokenizer has no chat template, the template refuses the messages, or
                writes them so that the assistant's turns cannot be found.
        """
        where = conversation.where
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: messages need a chat template, and the tokenizer of the model has none "
                f"(chat_template.jinja). Use a model that was made for chat, add a template, or give prompt and "
                "completion."
            )
        # Without what is null, as transformers gives them to a template, which would write None.
        messages = [{key: v for key, v in message.items() if v is not None} for message in conversation.messages]
        if _MARKED.search(str(self.tokenizer.chat_template)):
            return self._marked(messages, conversation)
        text = self._write(messages, conversation)
        spans = [
            self._turn(text, messages, number, conversation)
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and self._is_written(text, messages, number, conversation)
        ]
        return text, spans

    def _is_written(self, text: str, messages: list[dict[str, Any]], number: int, conversation: Conversation) -> bool:
        """Whether the template writes something of what a message says: there are some that know no calls of tools."""
        message = messages[number]
        if not says_something(message) or (message.get("content") or "").strip():
            return says_something(message)
        silent = {name: value for name, value in message.items() if name != "tool_calls"}
        silent["content"] = message.get("content") or ""
        return self._write([*messages[:number], silent, *messages[number + 1 :]], conversation) != text

    def _write(self, messages: list[dict[str, Any]], conversation: Conversation, *, prompt: bool = False) -> str:
        """The template's text of some messages; transformers runs the template in a sandbox."""
        tools = conversation.tools
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self._template(tools)
                )
            )
        except Exception as error:  # whatever a template raises
            raise _refused(conversation, error) from None

    def _template(self, tools: Any) -> dict[str, Any]:
        """The template, and the date where it asks for that."""
        template = str(self.tokenizer.get_chat_template(tools=tools))
        if not writes_date(self.tokenizer):
            return {"chat_template": template}
        return {"chat_template": _TOLD_DATE + template, "told_date": self._date}

    def _marked(self, messages: list[dict[str, Any]], conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
                **self._template(conversation.tools),
            )
        except Exception as error:  # whatever a template raises
            raise _refused(conversation, error) from None
        (text,), (spans,) = rendered
        return str(text), [(int(start), int(end)) for start, end in spans]

    def _turn(self, text: str, messages: list[dict[str, Any]], number: int, conversation: Conversation) -> Span:
        """Where the assistant's message `number` stands in the text of all messages.

        A word in the place of what it says tells where that begins and ends, whatever the template does with other
        turns. The turn begins before it, where the prompt for it ends; and ends behind it with what the template writes
        after a last turn, blanks left out.
        """
        told = [*messages[:number], {**messages[number], "content": _STAND_IN}]
        stood_in = self._write([*told, *messages[number + 1 :]], conversation)
        before, found, after = stood_in.partition(_STAND_IN)
        prompt = self._write(messages[:number], conversation, prompt=True) if number else None
        # What it thinks before it speaks may be elsewhere in the text than in that of the stand-in.
        starts = (prompt, before if found else None)
        begin = next((len(start) for start in starts if start is not None and text.startswith(start)), -1)
        end = -1
        if found and text.endswith(after):
            said = len(text) - len(after)
            token = self.tokenizer.eos_token or ""
            closings = [*self._as_last(self._write(told, conversation).partition(_STAND_IN)[2]), token]
            end = said + next((len(closing) for closing in closings if closing and text.startswith(closing, said)), 0)
        if not 0 <= begin <= end and messages[number].get("tool_calls"):
            # Some templates write calls in the place of the text: the turn ends where it would as the last one.
            wholes = self._as_last(self._write(messages[: number + 1], conversation))
            end = next((len(whole) for whole in wholes if text.startswith(whole)), -1)
        if not 0 <= begin <= end:
            raise UserError(
                f"{conversation.where}: the chat template of the model writes message {number + 1} so that it cannot "
                "be found in the text. Give prompt and completion, or mark in the template what is learned "
                "({% generation %})."
            )
        return begin, end

    def _as_last(self, written: str) -> tuple[str, str]:
        """What the template writes up to the end of a last turn, and that without the end token of the whole chat.

        Some templates write the end token once, behind all turns. Then no turn but the last one has it.
        """
        whole = written.rstrip()
        return whole, whole.removesuffix(self.tokenizer.eos_token or "").rstrip()


def writes_date(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer asks for the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def _directives(date: datetime.date) -> dict[str, str]:
    """What stands for each directive of `strftime` at the first minute of a day."""
    begin = datetime.datetime.combine(date, datetime.time())
    found = {"%%": "\0"}  # first, so that what follows is no directive
    for directive in (f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters):
        try:
            found[directive] = begin.strftime(directive)
        except ValueError:  # no such one on this system
            continue
    return {**found, "\0": "%"}


def _refused(conversation: Conversation, error: Exception) -> UserError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(
        f"{conversation.where}: the chat template of the model refuses the messages: {reason.rstrip('.')}."
    )
