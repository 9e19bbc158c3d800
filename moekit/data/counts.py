"""How often tokens, pairs of tokens and positions occur in a store: what balanced hash tables are made from.

A store holds sentences without special tokens. A model also sees a tag or bos before every sentence and eos behind it,
so the functions take what stands there; a decoder sees ``before=tokenizer.bos_id, after=tokenizer.eos_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moekit.data.store import TokenStore
from moekit.routers.hash_keys import Bigram

_CHUNK = 1 << 16  # sentences at a time


def token_counts(
    store: TokenStore,
    vocab_size: int,
    *,
    sections: Sequence[str] | None = None,
    before: int | None = None,
    after: int | None = None,
) -> Tensor:
    """How often each token occurs.

    Args:
        store: the corpus.
        vocab_size: V.
        sections: which; None = all of training (``train/...``). A section that is named twice counts twice.
        before: id of a token before every sentence.
        after: id of a token behind every sentence.

    Returns:
        Int64[V] on the CPU.

    Raises:
        ValueError: if a token is not in 0..V-1, or no section of training exists.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens, _ in _framed(store, sections, before, after):
        if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
            raise ValueError(
                f"token_counts needs vocab_size to cover the store and the tokens around sentences: got {vocab_size} "
                f"and a token {int(tokens.max())}. Use tokenizer.vocab_size."
            )
        counts += np.bincount(tokens, minlength=vocab_size)
    return torch.from_numpy(counts)


def bigram_counts(
    store: TokenStore,
    key: Bigram,
    *,
    first: int = 0,
    sections: Sequence[str] | None = None,
    before: int | None = None,
    after: int | None = None,
) -> Tensor:
    """How often each bucket of pairs (token before, token) occurs.

    `key` makes the buckets. `first` counts as the token before the first of a sequence: the padding id in transformers
    of this package. The other arguments are those of `token_counts`.

    Returns:
        Int64[buckets] on the CPU.
    """
    counts = torch.zeros(key.num_keys, dtype=torch.int64)
    for tokens, starts in _framed(store, sections, before, after):
        previous = np.concatenate([tokens[:1], tokens[:-1]])
        previous[starts] = first
        bucket = key.bucket(torch.from_numpy(previous), torch.from_numpy(tokens))
        counts += torch.bincount(bucket, minlength=key.num_keys)
    return counts


def _framed(
    store: TokenStore, sections: Sequence[str] | None, before: int | None, after: int | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Tokens of some sentences at a time, with what stands around them, and the places where sequences begin."""
    if sections is None:
        sections = [name for name in store.sections if name.startswith("train/")]
        if not sections:
            raise ValueError(
                "counting needs sections: the store has none of training, only "
                f"{', '.join(store.sections) or 'nothing'}."
            )
    for name in sections:
        where = store.section(name)
        last = where.first + where.count
        for low in range(where.first, last, _CHUNK):
            edges = np.asarray(store.offsets[low : min(low + _CHUNK, last) + 1])
            text = store.read(edges[:-1], np.diff(edges))
            text = text if before is None else text.prepend(before)
            text = text if after is None else text.append(after)
            yield text.tokens, text.starts[text.lengths > 0]
