"""Text of the user's as the model of a folder of transformers reads it."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moekit.data.sources import Source, Split, open_source, source_class
from moekit.errors import UserError
from moekit.folder_text.encoding import IGNORED, Encoded, Encoder, load_tokenizer
from moekit.folder_text.splits import Files, example_files, split_examples
from moekit.huggingface.folder import read_config
from moekit.wording import counted

_SPLITS: Mapping[Split, str] = {"train": "training", "valid": "validation", "test": "test"}
_PAIRS = "Give parallel text: moses, jsonl of translations, tsv or examples."


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """Which text is read, and how much of it.

    Attributes:
        source: kinds of source, as `moekit.data.sources.open_source` knows them. JSON lines that are no translations,
            and a single file of text, are examples, as fine-tuning of a folder reads them.
        path: where the text lies; None where it is generated.
        languages: those that are read, or their codes by their names in the data; empty = all.
        tokens: at most so many of a split.
        length: tokens of a sequence.
        date: the day that chat templates are told: one for all splits, also where a command runs past midnight.
    """

    source: str
    path: str | None = None
    languages: Sequence[str] | Mapping[str, str] = ()
    tokens: int = 65_536
    length: int = 512
    date: datetime.date = field(default_factory=datetime.date.today)

    def open(self) -> Source:
        """The text.

        Raises:
            UserError: it cannot be read.
        """
        kind = source_class(self.source)
        if not {"path", "languages"} <= kind.parameters().keys():
            self.require_no_languages(self.source)
        return open_source(self.source, self.path, **({"languages": self.languages} if self.languages else {}))

    def require_no_languages(self, what: str) -> None:
        """Make sure that no languages are chosen of text that has none.

        Raises:
            UserError: some are.
        """
        if self.languages:
            raise UserError(f"{what} has no languages to choose from: leave --data.languages out.")


@dataclass(frozen=True)
class FolderText:
    """Batches of token ids.

    Attributes:
        batches: arguments of the model's forward, labels included.
        predictions: labels that count in each.
        predicted: what those are, in two words.
        said: what the text is, in a few.
    """

    batches: Sequence[dict[str, Tensor]]
    predictions: Sequence[int]
    predicted: str
    said: str


def folder_text(folder: Path, choice: TextChoice, split: Split) -> FolderText:
    """A split of the user's text for the model of a folder, by the tokenizer that lies there.

    A decoder reads examples one by one, as fine-tuning does, and other text one sentence after the other, cut into
    sequences of one length. An encoder-decoder reads pairs.

    Raises:
        UserError: there is no tokenizer, no text of the split, none that is parallel for an encoder-decoder, or a
            language that the tokenizer does not know.
    """
    _, config = read_config(folder)
    if (files := example_files(choice.source, choice.path)) is not None:
        return _of_examples(folder, config, choice, files, split)
    source, words = choice.open(), load_tokenizer(folder, fast=False)
    if config.is_encoder_decoder:
        batches, predicted = _pairs(words, source, choice, split), "answers"
        predictions = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    else:
        batches, predicted = _sequences(words, source, choice, split), "next tokens"
        predictions = [batch["labels"][:, 1:].numel() for batch in batches]  # nothing comes before the first token
    said = _said(batches, choice, split, ", ".join(source.languages))
    return FolderText(batches, predictions, predicted, said)


def _said(batches: Sequence[dict[str, Tensor]], choice: TextChoice, split: Split, what: str) -> str:
    """What is said of batches; UserError where there are none."""
    if not batches:
        raise UserError(
            f"{choice.source} must have {_SPLITS[split]} text, more than a token of it: it has none. Give text with "
            "this split."
        )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return f"{counted(tokens, 'token')} of {_SPLITS[split]} text ({choice.source}: {what})"


def _of_examples(folder: Path, config: Any, choice: TextChoice, files: Files, split: Split) -> FolderText:
    """Examples, each in a row of its own, of similar lengths in a batch."""
    if config.is_encoder_decoder:
        raise UserError(f"an encoder-decoder reads pairs, and {choice.path} holds examples for decoders. {_PAIRS}")
    choice.require_no_languages(f"{choice.source} of examples")
    examples = split_examples(files, "text" if choice.source == "text" else "jsonl", split)
    encoder = Encoder(load_tokenizer(folder), max_length=choice.length, vocab_size=config.vocab_size, date=choice.date)
    found: list[Encoded] = []
    read = cut = empty = tokens = 0
    for example in examples:
        made = encoder.encode([example])
        size = sum(map(len, made.examples))
        if found and tokens + size > choice.tokens:
            break
        found += made.examples
        read, cut, empty, tokens = read + 1, cut + made.cut, empty + made.empty, tokens + size
    found.sort(key=len)
    parts = [found[first : first + _rows(choice)] for first in range(0, len(found), _rows(choice))]
    what = counted(read, "example")
    what += f", {cut:,} of them cut to {choice.length:,} tokens" if cut else ""
    what += f", {empty:,} left out with nothing to learn" if empty else ""
    batches = [_padded(part, encoder.pad) for part in parts]
    predictions = [sum(one.predicted for one in part) for part in parts]
    return FolderText(batches, predictions, "learned tokens", _said(batches, choice, split, what))


def _padded(part: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    ids = [torch.from_numpy(one.ids) for one in part]
    labels = [torch.from_numpy(one.labels) for one in part]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _sentences(source: Source, split: Split) -> Iterator[str]:
    """Those of all languages in turn, so that a part of them is of each."""
    rows = [source.monolingual(language, split) for language in source.languages]
    return (text for turn in itertools.zip_longest(*rows) for text in turn if text)


def _sequences(words: Any, source: Source, choice: TextChoice, split: Split) -> list[dict[str, Tensor]]:
    end = [] if words.eos_token_id is None else [words.eos_token_id]
    ids: list[int] = []
    for text in _sentences(source, split):
        ids += [*words(text, add_special_tokens=False)["input_ids"], *end]
        if len(ids) >= choice.tokens:
            break
    length = min(choice.length, len(ids), choice.tokens)
    if length < 2:
        return []
    rows = torch.tensor(ids[: min(len(ids), choice.tokens) // length * length]).view(-1, length)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in rows.split(_rows(choice))
    ]


def _pairs(words: Any, source: Source, choice: TextChoice, split: Split) -> list[dict[str, Tensor]]:
    if not source.directions:
        raise UserError(f"an encoder-decoder reads pairs, and {choice.source} has none. {_PAIRS}")
    batches: list[dict[str, Tensor]] = []
    tokens, size = 0, _rows(choice)
    rows = {direction: source.parallel(direction, split) for direction in source.directions}
    for first in range(0, max(map(len, rows.values()), default=0), size):
        for direction, pairs in rows.items():
            some = [pairs[i] for i in range(first, min(first + size, len(pairs)))]
            if tokens >= choice.tokens:
                return batches
            if not some:
                continue
            _set_languages(words, direction.source, direction.target)
            batch = words(
                [pair[0] for pair in some], text_target=[pair[1] for pair in some], max_length=choice.length,
                truncation=True, padding=True, return_tensors="pt",
            )  # fmt: skip
            labels = batch["labels"].masked_fill(batch["labels"] == words.pad_token_id, IGNORED)
            mask = batch["attention_mask"]
            batches.append({"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels})
            tokens += int(mask.sum())
    return batches


def _set_languages(words: Any, source: str, target: str) -> None:
    """Tell a tokenizer that writes languages which they are."""
    if not hasattr(words, "src_lang"):
        return
    for code in (source, target):
        if words.convert_tokens_to_ids(code) in (None, words.unk_token_id):
            raise UserError(
                f"the tokenizer must know the language {code}: it does not. Say which language has which name, as in "
                f"--data.languages {code}=eng_Latn."
            )
    words.src_lang, words.tgt_lang = source, target


def _rows(choice: TextChoice) -> int:
    return max(1, 4096 // choice.length)
