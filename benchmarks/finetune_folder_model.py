"""What `finetune_folder.py` fine-tunes, and on what: a Qwen3-MoE of transformers, packed rows, and their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
import transformers
from torch import Tensor

from moekit.folder_text.encoding import IGNORED, Encoded
from moekit.folders.batches import Dealing, FolderBatch, TrainingBatches
from moekit.folders.packing import pack
from moekit.huggingface import packed


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        seconds: of each arm, by clock, round by round, the floor first.
        tokens: those of a step, all processes together.
        losses: of each arm, step by step.
    """

    seconds: Mapping[str, Mapping[str, list[float]]]
    tokens: int
    losses: Mapping[str, Sequence[float]]


def batch_of(rows: int, length: int, vocab_size: int, rank: int = 0, ranks: int = 1) -> FolderBatch:
    """A rank's rows of examples of 10 to 60 tokens, of which the later half is learned."""
    draw = np.random.default_rng(0)
    examples = []
    for size in draw.integers(10, min(60, length) + 1, 4 * ranks * rows * length // 35):
        ids = draw.integers(3, vocab_size, size)
        examples.append(Encoded(ids, np.where(np.arange(size) < size // 2, IGNORED, ids)))
    chosen = pack([len(example) for example in examples], length)[: ranks * rows]
    packed_rows = [[examples[number] for number in row] for row in chosen]
    return TrainingBatches(packed_rows, Dealing(rows, rank, ranks), pad=0, seed=0)[0]


def qwen3_moe(dim: int, layers: int, experts: int, vocab_size: int) -> Any:
    """A Qwen3-MoE that is narrower than the published ones, with eight experts of many for a token."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocab_size, hidden_size=dim, intermediate_size=3 * dim, moe_intermediate_size=3 * dim // 8,
        num_hidden_layers=layers, num_attention_heads=max(dim // 64, 2), num_key_value_heads=max(dim // 128, 1),
        head_dim=64 if dim >= 128 else 16, num_experts=experts, num_experts_per_tok=min(8, experts // 2),
        norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")


def loss_of(model: Any, batch: FolderBatch, *, adopted: bool) -> Tensor:
    """Nats for a learned token."""
    if adopted:
        with packed(model, batch.real, batch.sequence):
            logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    else:
        logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    scores, wanted = logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()
    return F.cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum") / batch.predictions
