"""The hashes that the Hash Layers paper compares, as presets of `HashRouter`.

All of them take ``num_experts``, E, and the ``seed`` of what is drawn: a random table, the start of k-means, or the
order among keys of equal count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.functional.hash_tables import (
    balanced_table,
    clustered_table,
    dealt_table,
    dispersed_table,
    random_table,
)
from moekit.routers.hash import HashRouter
from moekit.routers.hash_keys import Bigram, CurrentToken, NextToken, PreviousToken, TokenPosition
from moekit.routing import Capacity


def hash_layers(num_experts: int, counts: Tensor, *, seed: int = 0, capacity: Capacity | None = None) -> HashRouter:
    """Balanced hash of the current token: the paper's best.

    Args:
        num_experts: E.
        counts: Int[V], how often each token occurs (`moekit.data.counts.token_counts`).
        seed: seed of the order among tokens of equal count.
        capacity: slots per expert; None = dropless.

    Source: arXiv:2106.04426 (balanced assignment).

    Example:
        >>> import torch
        >>> import moekit as mk
        >>> ids = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
        >>> router = mk.routers.hash_layers(2, counts=torch.bincount(ids.flatten()))
        >>> moe = mk.MoELayer(router, mk.experts.GroupedMLP(2, 16, 64))
        >>> _, routing = moe(torch.randn(1, 8, 16), mk.RoutingContext(token_ids=ids))
        >>> mk.routing_stats(routing).load
        tensor([4, 4])
    """
    return HashRouter(num_experts, balanced_table(counts, num_experts, seed=seed), capacity=capacity)


def hash_random(num_experts: int, vocab_size: int, *, seed: int = 0) -> HashRouter:
    """Random hash of the current token, one of `vocab_size`.

    Source: arXiv:2106.04426 (random hash).
    """
    return HashRouter(num_experts, random_table(vocab_size, num_experts, seed=seed))


def hash_previous(num_experts: int, counts: Tensor, *, seed: int = 0) -> HashRouter:
    """Balanced hash of the token before; `counts` say how often each token comes before another.

    Source: arXiv:2106.04426 (previous token hash).
    """
    table = balanced_table(counts, num_experts, seed=seed)
    return HashRouter(num_experts, table, key=PreviousToken(counts.numel()))


def hash_bigram(num_experts: int, key: Bigram | int, *, counts: Tensor | None = None, seed: int = 0) -> HashRouter:
    """Hash of the token before and the token together.

    Args:
        num_experts: E.
        key: how pairs fall into buckets, or V for the default of `Bigram`.
        counts: Int[buckets], how often each bucket occurs (`moekit.data.counts.bigram_counts`), for a balanced table;
            None = a random one.
        seed: seed of the table.

    Source: arXiv:2106.04426 (bigram hash). Differs: pairs go through buckets.
    """
    key = Bigram(key) if isinstance(key, int) else key
    if counts is None:
        table = random_table(key.num_keys, num_experts, seed=seed)
    else:
        table = balanced_table(counts, num_experts, seed=seed)
    return HashRouter(num_experts, table, key=key)


def hash_position(num_experts: int, max_length: int, *, seed: int = 0) -> HashRouter:
    """Hash of the position in a sequence of at most `max_length`, positions dealt to experts in a random order.

    Source: arXiv:2106.04426 (position hash).
    """
    return HashRouter(num_experts, dealt_table(max_length, num_experts, seed=seed), key=TokenPosition(max_length))


def hash_clustered(num_experts: int, embeddings: Tensor, *, seed: int = 0) -> HashRouter:
    """Similar tokens to the same expert: k-means of ``embeddings`` Float[V, any] of a model that was trained before.

    Source: arXiv:2106.04426 (token clusters).
    """
    return HashRouter(num_experts, clustered_table(embeddings, num_experts, seed=seed))


def hash_dispersed(num_experts: int, embeddings: Tensor, *, seed: int = 0) -> HashRouter:
    """Similar tokens to different experts: every cluster of `hash_clustered` dealt to all.

    Source: arXiv:2106.04426 (dispersed hash).
    """
    return HashRouter(num_experts, dispersed_table(embeddings, num_experts, seed=seed))


def hash_oracle(num_experts: int, counts: Tensor, *, seed: int = 0, allow_future: bool = False) -> HashRouter:
    """Balanced hash of the NEXT token: what a language model could do if it were told the answer, in part.

    Args:
        num_experts: E; each expert tells log2 E bits of the answer.
        counts: Int[V], how often each token comes after another.
        seed: seed of the order among tokens of equal count.
        allow_future: needed in a causal decoder, where this is cheating, and meant to be.

    Source: arXiv:2106.04426 (oracle future hash).
    """
    table = balanced_table(counts, num_experts, seed=seed)
    return HashRouter(num_experts, table, key=NextToken(counts.numel()), allow_future=allow_future)


def multi_hash(
    num_experts: int,
    counts: Tensor,
    *,
    num_tables: int = 2,
    seed: int = 0,
    capacity: Capacity | None = None,
) -> HashRouter:
    """MultiHash: several balanced tables of the current token, one for each segment of the hidden dimension.

    Its bank is ``MultiHashMLP(num_experts, dim, hidden_dim, num_segments=num_tables)``.

    Args:
        num_experts: E, what each table chooses from.
        counts: Int[V].
        num_tables: K, the segments; 2, 4 and 8 are natural (ours).
        seed: seed of the tables, which differ from one another.
        capacity: slots per segment expert; None = dropless.

    Raises:
        ValueError: if `num_tables` is less than 1.

    Source: arXiv:2106.04426 (MultiHash). Differs: balanced tables instead of random ones.
    """
    if num_tables < 1:
        raise ValueError(f"multi_hash needs at least one table: got num_tables={num_tables}.")
    tables = [
        balanced_table(counts, num_experts, seed=seed * num_tables + m, shuffled="octave") for m in range(num_tables)
    ]
    return HashRouter(num_experts, torch.stack(tables), key=CurrentToken(counts.numel()), capacity=capacity)
