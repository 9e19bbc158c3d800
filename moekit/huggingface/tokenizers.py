"""Our SentencePiece vocabulary in the JSON form that transformers' fast tokenizers read, and back."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError

_MODEL = "tokenizer.model"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers, and ``tokenizer.model`` for us.

    Text gives the same ids in both, and the end token follows it. Differs: in transformers a mark that is written in
    the text is the mark, so ``"<2de> hello"`` begins with the tag of German, as the input of a translation does; in
    moekit no text ever gives a mark.

    Args:
        tokenizer: The vocabulary, of the kind "unigram".
        folder: A folder that exists.

    Raises:
        UserError: for a vocabulary of the kind "bpe", whose merges transformers needs and SentencePiece does not keep.
    """
    proto, languages = tokenizer.__reduce__()[1]
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    fields = list(_fields(proto))
    trainer = dict(_fields(next(value for number, value in fields if number == 2)))
    if trainer.get(3, 1) != 1:
        raise UserError(
            "only a tokenizer of the kind unigram can be written for transformers: this one is of another kind. Export "
            "the model without it."
        )
    normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": processor.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i in range(tokenizer.first_text_id)
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(normalizer.get(2, b"")))},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_template("Sequence", "A"), _template("SpecialToken", "</s>")],
            "pair": [_template("Sequence", "A"), _template("Sequence", "B"), _template("SpecialToken", "</s>")],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [tokenizer.eos_id], "tokens": ["</s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "vocab": [[processor.id_to_piece(i), processor.get_score(i)] for i in range(len(processor))],
            "byte_fallback": any(processor.is_byte(i) for i in range(len(processor))),
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "languages": list(languages),
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / _MODEL).write_bytes(proto)


def read_tokenizer(folder: Path | str) -> Tokenizer:
    """Our tokenizer of a folder that `moekit.huggingface.export_model` wrote.

    Raises:
        UserError: if it has none, or that of another program.
    """
    path = Path(folder) / _MODEL
    if not path.is_file():
        raise UserError(f"{folder} must hold {_MODEL}, as an export of moekit with its tokenizer does: it has none.")
    proto = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise UserError(f"{path} must be a SentencePiece model: {error}.") from None
    languages = []
    for i in range(Tokenizer.first_tag_id, len(processor)):
        tag = re.fullmatch(r"<2(.+)>", processor.id_to_piece(i))
        if tag is None:
            break
        languages.append(tag[1])
    return Tokenizer(proto, languages)


def _normalizers(charsmap: bytes) -> Iterator[dict[str, Any]]:
    """SentencePiece's rules, then no space at the ends and none twice."""
    if charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")}
    yield {"type": "Strip", "strip_left": True, "strip_right": True}
    yield {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def _template(kind: str, name: str) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": 0}}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protobuf message's fields: whole numbers, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        yield number, message[at : at + size]
        at += size
