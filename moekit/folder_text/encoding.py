"""Examples as token ids, and which of them are learned: by a folder's own tokenizer and chat template."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.errors import UserError
from moekit.folder_text.chat import ChatTemplate
from moekit.folder_text.examples import Completion, Conversation, Example, PlainText
from moekit.huggingface.folder import TOKENIZER_FILES, read_config

IGNORED = -100
"""The label of a token that is not learned, as in transformers."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """An example as a model reads it.

    Attributes:
        ids: Int64[S], token ids.
        labels: Int64[S], the same where a token is to be predicted, else `IGNORED`; the first never is.
    """

    ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class EncodedExamples:
    """All examples of a split.

    Attributes:
        examples: those that teach something.
        cut: how many conversations and completions were longer than a row.
        empty: how many had nothing to learn within a row, and are left out.
    """

    examples: list[Encoded]
    cut: int
    empty: int


def load_tokenizer(folder: str | os.PathLike[str], *, fast: bool = True) -> Any:
    """The tokenizer of a folder of transformers; nothing in the folder is executed.

    Args:
        folder: the folder.
        fast: whether it must be a fast one, which `Encoder` needs.

    Raises:
        UserError: there is none, it is no fast one, or the folder is none of transformers.
    """
    import transformers

    place = Path(os.path.abspath(folder))
    read_config(place)  # of a broken one transformers complains when it opens the tokenizer
    if not any((place / file).is_file() for file in TOKENIZER_FILES):  # transformers would make an empty one
        raise UserError(
            f"{place} must have a tokenizer, by which text is read: it has none of {', '.join(TOKENIZER_FILES)}. Copy "
            "that of the model into the folder."
        )
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{place} must have a tokenizer that transformers opens (tokenizer.json): {reason}") from None
    if fast and not found.is_fast:
        raise UserError(
            f"{place} must have a fast tokenizer, which knows where each token stands in the text: got "
            f"{type(found).__name__}. Save it as one: AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    return found


class Encoder:
    """Encodes examples with a tokenizer.

    A text gets the tokenizer's own special tokens, and its end token; so does a completion with its prompt before it. A
    conversation has what its chat template writes and nothing else.

    Args:
        tokenizer: fast, of transformers.
        max_length: the most tokens of a row.
        vocab_size: the rows of the model's vocabulary, which ids must be below.
        date: the day that a chat template is told, as `ChatTemplate` takes it; None = today.

    Raises:
        UserError: the tokenizer has ids that the model has not; in use, as `ChatTemplate`.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, vocab_size: int, date: datetime.date | None = None) -> None:
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        self._chat = ChatTemplate(tokenizer, date)
        self._words = _with_whole_offsets(tokenizer)

    @property
    def pad(self) -> int:
        """The id of padding: the tokenizer's own, if the model has a row for it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(pad for pad in ids if pad is not None and pad < self.vocab_size))

    def encode(self, examples: Iterable[Example]) -> EncodedExamples:
        """Ids and labels of examples, divided and cut to rows.

        Raises:
            UserError: naming file and line: as `ChatTemplate`, or an id is beyond the model's vocabulary.
        """
        found: list[Encoded] = []
        cut = empty = 0
        for example in examples:
            ids, learned = self._tokens(example)
            if len(ids) and max(ids) >= self.vocab_size:
                raise UserError(
                    f"{example.where}: the tokenizer writes the token {max(ids)} "
                    f"({self.tokenizer.convert_ids_to_tokens(max(ids))!r}), and the model has {self.vocab_size} rows "
                    "in its vocabulary. Use the tokenizer of the model, or enlarge the model "
                    "(resize_token_embeddings) and save it."
                )
            whole = np.array(ids, dtype=np.int64)
            labels = np.where(np.array(learned, dtype=bool), whole, IGNORED)
            if isinstance(example, PlainText):
                parts = [slice(n, n + self.max_length) for n in range(0, len(ids), self.max_length)]
            else:
                parts, cut = [slice(0, self.max_length)], cut + (len(ids) > self.max_length)
            for part in parts:
                one = Encoded(whole[part], labels[part].copy())
                one.labels[:1] = IGNORED
                if one.predicted:
                    found.append(one)
                else:
                    empty += 1
        return EncodedExamples(found, cut, empty)

    def _tokens(self, example: Example) -> tuple[list[int], list[bool]]:
        match example:
            case Conversation():
                text, spans = self._chat.render(example)
                return self._aligned(text, spans, special=False)
            case Completion():
                whole = example.prompt + example.completion
                ids, learned = self._aligned(whole, [(len(example.prompt), len(whole))], special=True)
            case PlainText():
                ids, learned = self._aligned(example.text, [(0, len(example.text))], special=True)
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids, learned = [*ids, end], [*learned, True]
        elif ids:
            learned[-1] = True
        return ids, learned

    def _aligned(self, text: str, spans: Sequence[tuple[int, int]], *, special: bool) -> tuple[list[int], list[bool]]:
        """Ids of a text, and which of them stand in one of the spans of characters, even in part."""
        made = self._words(
            text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return list(made["input_ids"]), list(_in_spans(made["offset_mapping"], spans))


def _with_whole_offsets(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it, that says of every token where all of it stands.

    A byte-level tokenizer may trim blanks off offsets. Nothing is left of those of a token that is blank, such as the
    indentation of code, which then seems to stand in no span.
    """
    processor = tokenizer.backend_tokenizer.post_processor
    state = b"" if processor is None else processor.__getstate__()
    whole = state.replace(b'"trim_offsets":true', b'"trim_offsets":false')  # of each part, where it is a sequence
    if whole == state:
        return tokenizer
    untrimmed = copy.deepcopy(processor)
    untrimmed.__setstate__(whole)
    found = copy.deepcopy(tokenizer)  # the user's stays as it is
    found.backend_tokenizer.post_processor = untrimmed
    return found


def _in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    for start, end in offsets:
        # Special tokens that the tokenizer adds stand nowhere: their offsets are empty.
        yield any(start < last and end > first for first, last in spans) and end > start
