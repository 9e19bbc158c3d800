"""The tables of hash layers, made from the text of a run or from the embeddings of another."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moekit.data.counts import bigram_counts, token_counts
from moekit.data.module import MultitaskData
from moekit.errors import UserError
from moekit.routers import (
    Bigram,
    HashRouter,
    hash_bigram,
    hash_clustered,
    hash_dispersed,
    hash_layers,
    hash_oracle,
    hash_position,
    hash_previous,
    hash_random,
    multi_hash,
)
from moekit.training.checkpoint_io import load_checkpoint
from moekit.training.run_folder import RunFolder

Hash = Literal["balanced", "random", "previous", "bigram", "position", "clustered", "dispersed", "oracle"]

_POSITIONS = 4096
"""Of the position hash: room to write beyond the longest sentence."""


def hash_router(
    kind: Hash,
    num_experts: int,
    vocab_size: int,
    data: MultitaskData | None,
    *,
    tables: int = 1,
    seed: int = 0,
    embeddings: str | None = None,
) -> HashRouter:
    """The router of a hash layer in a language model.

    Args:
        kind: what chooses the expert; see `moekit.routers`. The oracle may stand in a decoder.
        num_experts: E.
        vocab_size: V.
        data: the run's, whose training text is counted as the model will see it: bos before every sentence, the last
            token predicted and never read. None = a table of the same shape that knows neither text nor embeddings,
            for models that are only looked at or whose weights are loaded.
        tables: more than 1 = MultiHash, for the balanced kind.
        seed: of the table.
        embeddings: folder of a trained run with the same vocabulary, for clustered and dispersed tables.

    Raises:
        UserError: if several tables are asked of another kind, or the embeddings are not there or do not fit.
    """
    if tables > 1 and kind != "balanced":
        raise UserError(f"model.tables above 1 needs model.hash balanced: got {tables} and {kind}.")

    def counts(*, before: int | None = None, after: int | None = None) -> Tensor:
        if data is None:
            return torch.ones(vocab_size, dtype=torch.int64, device="cpu")
        return token_counts(data.store, vocab_size, before=before, after=after)

    begin, end = (None, None) if data is None else (data.tokenizer.bos_id, data.tokenizer.eos_id)
    match kind:
        case "balanced" if tables > 1:
            return multi_hash(num_experts, counts(before=begin), num_tables=tables, seed=seed)
        case "balanced":
            return hash_layers(num_experts, counts(before=begin), seed=seed)
        case "random":
            return hash_random(num_experts, vocab_size, seed=seed)
        case "previous":
            return hash_previous(num_experts, counts(before=begin), seed=seed)
        case "bigram":
            key = Bigram(vocab_size, seed=seed)
            pairs = None if data is None else bigram_counts(data.store, key, before=begin)
            return hash_bigram(num_experts, key, counts=pairs, seed=seed)
        case "position":
            return hash_position(num_experts, _POSITIONS, seed=seed)
        case "clustered" | "dispersed" if data is None:
            return hash_random(num_experts, vocab_size, seed=seed)
        case "clustered":
            return hash_clustered(num_experts, _embeddings(embeddings, vocab_size), seed=seed)
        case "dispersed":
            return hash_dispersed(num_experts, _embeddings(embeddings, vocab_size), seed=seed)
        case "oracle":
            return hash_oracle(num_experts, counts(after=end), seed=seed, allow_future=True)


def _embeddings(run: str | None, vocab_size: int) -> Tensor:
    """Float[V, D], the token embeddings of the best checkpoint of a run."""
    checkpoint = None if run is None else RunFolder.open(run).best_checkpoint
    if checkpoint is None:
        raise UserError(
            f"model.hash clustered and dispersed need model.embeddings, the folder of a trained run: got {run}. For "
            "example train --variant tiny_dense and give its folder."
        )
    state = load_checkpoint(checkpoint)["state_dict"]
    table: Tensor | None = state.get("backbone.embedding.weight")
    if table is None or table.shape[0] != vocab_size:
        found = "no token embeddings" if table is None else f"a vocabulary of {table.shape[0]}"
        raise UserError(f"model.embeddings must be of a run with this one's vocabulary of {vocab_size}: got {found}.")
    return table
