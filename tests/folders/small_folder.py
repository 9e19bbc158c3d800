"""Small folders of transformers with a tokenizer of bytes, and files of examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0", reason="folders are those of transformers 5")

SPECIALS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate((*SPECIALS, *letters))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = template
    return found


def model(**more: Any) -> Any:
    """An OLMoE with weights that make all parts matter."""
    own = tokenizer()
    torch.manual_seed(0)
    made = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(vocab_size=len(own), **{**SIZES, **more}))
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return made


def write_small_folder(place: Path, template: str | None = TEMPLATE, **more: Any) -> Path:
    """A folder of a small OLMoE."""
    model(**more).save_pretrained(place)
    tokenizer(template).save_pretrained(place)
    return place


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """A file of JSON lines; its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A conversation of user and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": [*first, *({"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns))]}


MIXED = [
    chat("hello", "hi"),
    {"text": "to be or not"},
    {"prompt": "2 + 2 = ", "completion": "4"},
    chat("and", "so", "on", "and on", system="speak"),
    {"text": "a longer text than that of the others, in one line"},
    {"prompt": "the sea is ", "completion": "deep"},
    {"text": "seven"},
    chat("why", "because"),
]
