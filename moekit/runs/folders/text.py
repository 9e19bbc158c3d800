"""Text of the user's as the model of a folder of transformers reads it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.data.sources import Source, Split, open_source, source_class
from moekit.errors import UserError
from moekit.stored import parse_json

_SPLITS: Mapping[Split, str] = {"train": "training", "valid": "validation", "test": "test"}
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
)  # fmt: skip
IGNORED = -100
"""The label of padding, which no loss counts."""


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """Which text is read, and how much of it.

    Attributes:
        source: kinds of source, as `moekit.data.sources.open_source` knows them.
        path: where the text lies; None where it is generated.
        languages: those that are read, or their codes by their names in the data; empty = all.
        tokens: at most so many of a split.
        length: tokens of a sequence.
    """

    source: str
    path: str | None = None
    languages: Sequence[str] | Mapping[str, str] = ()
    tokens: int = 65_536
    length: int = 512

    def open(self) -> Source:
        """The text.

        Raises:
            UserError: it cannot be read.
        """
        kind = source_class(self.source)
        if self.languages and not {"path", "languages"} <= kind.parameters().keys():
            raise UserError(f"{self.source} has no languages to choose from: leave --data.languages out.")
        return open_source(self.source, self.path, **({"languages": self.languages} if self.languages else {}))


@dataclass(frozen=True)
class FolderText:
    """Batches of token ids.

    Attributes:
        batches: arguments of the model's forward, labels included.
        predictions: labels that count in each.
        said: what it is, in a few words.
    """

    batches: Sequence[dict[str, Tensor]]
    predictions: Sequence[int]
    said: str


def folder_text(folder: Path, choice: TextChoice, split: Split) -> FolderText:
    """A split of the user's text for the model of a folder, by the tokenizer that lies there.

    A decoder reads sentences one after the other, cut into sequences of one length. An encoder-decoder reads pairs.

    Raises:
        UserError: there is no tokenizer, no text of the split, none that is parallel for an encoder-decoder, or a
            language that the tokenizer does not know.
    """
    source = choice.open()
    words = _tokenizer(folder)
    if parse_json((folder / "config.json").read_bytes()).get("is_encoder_decoder"):
        batches = _pairs(words, source, choice, split)
        predictions = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
    else:
        batches = _sequences(words, source, choice, split)
        predictions = [batch["labels"][:, 1:].numel() for batch in batches]  # nothing comes before the first token
    if not batches:
        raise UserError(
            f"{choice.source} must have {_SPLITS[split]} text, more than a token of it: it has none. Give text with "
            "this split."
        )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    languages = ", ".join(source.languages)
    return FolderText(
        batches, predictions, f"{tokens:,} tokens of {_SPLITS[split]} text ({choice.source}: {languages})"
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _TOKENIZERS):  # it would make an empty one
        raise UserError(
            f"{folder} must hold a tokenizer, by which text is read: there is none of {', '.join(_TOKENIZERS)}."
        )
    try:
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{folder} must hold a tokenizer, by which text is read: {error}") from None
    return words


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
        raise UserError(
            f"an encoder-decoder reads pairs, and {choice.source} has none. Give parallel text: moses, jsonl, tsv or "
            "examples."
        )
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
