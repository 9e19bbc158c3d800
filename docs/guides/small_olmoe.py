"""Train a small OLMoE from scratch on text that tells facts, and write it as a folder of transformers with a tokenizer.

    python docs/guides/small_olmoe.py small
    moekit finetune --model small/olmoe --data.path small/other.jsonl --fine_tune.rank 8 --out small/tuned

The text is generated (see the guide on text that knows things). The model reads facts in one language;
``small/other.jsonl`` tells facts in another, which fine-tuning then teaches it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from moekit.data.sources import open_source

SPECIALS = ("<pad>", "<s>", "</s>")
VOCABULARY, BATCH, LENGTH = 512, 16, 48


def tokenizer_of(lines: Sequence[str]) -> Any:
    """Pieces of bytes, joined by how often they stand together."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    )
    pad, begin, end = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token=pad, bos_token=begin, eos_token=end)


def small_model(tokenizer: Any) -> OlmoeForCausalLM:
    """Two layers of eight experts, of which a token goes to two."""
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def train(model: OlmoeForCausalLM, tokenizer: Any, lines: Sequence[str], steps: int) -> float:
    """A plain loop over the lines; the loss of the last batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.zeros(())
    for step in range(steps):
        chosen = [lines[(step * BATCH + row) % len(lines)] + SPECIALS[2] for row in range(BATCH)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def make(out: Path, *, steps: int = 300, examples: int = 400, seed: int = 1) -> float:
    """Write ``out/olmoe`` and ``out/other.jsonl``; the loss at the end of training."""
    torch.manual_seed(seed)
    text = open_source("facts", languages=2, entities=60, relations=3, values=8, train_sentences=4_000)
    first, other = (list(text.monolingual(language, "train")) for language in text.languages)
    tokenizer = tokenizer_of([*first[:1000], *other[:1000]])
    model = small_model(tokenizer)
    loss = train(model, tokenizer, first, steps)
    model.save_pretrained(out / "olmoe")
    tokenizer.save_pretrained(out / "olmoe")
    rows = (json.dumps({"text": line}, ensure_ascii=False) for line in other[:examples])
    (out / "other.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return loss


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder."""
    parser = argparse.ArgumentParser(description="Train a small OLMoE, and write it as a folder of transformers.")
    parser.add_argument("out", type=Path, help="folder for the model and the text to fine-tune on")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: 300)")
    given = parser.parse_args(arguments)
    print(f"loss {make(given.out, steps=given.steps):.3f} after {given.steps} steps; {given.out / 'olmoe'} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
