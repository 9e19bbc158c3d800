"""Counts of a store against a literal loop, and tables balanced on babel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_corpus import TinySource, stored

from moekit import routers
from moekit.babel import Babel, BabelSettings
from moekit.data import counts as counting
from moekit.data.counts import bigram_counts, token_counts
from moekit.data.store import TokenStore, Wanted, cached_store
from moekit.data.tokenizer import train_tokenizer
from moekit.functional.hash_tables import balanced_table
from moekit.routers import Bigram
from moekit.routing import RoutingContext, routing_stats
from moekit.source import Direction

AB = Direction.parse("aa-bb")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    cache = tmp_path_factory.mktemp("cache")
    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=cache)
    wanted = Wanted(parallel=((AB, "train"), (AB, "valid")), monolingual=(("cc", "train"),))
    return cached_store(TinySource(), tokenizer, wanted, cache_dir=cache)


@pytest.mark.parametrize("chunk", [1 << 16, 7])
@pytest.mark.parametrize(("before", "after"), [(None, None), (1, 2), (None, 2), (1, None)])
def test_counts_are_the_literal_ones(
    store: TokenStore, before: int | None, after: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_CHUNK", chunk)
    sections = ["valid/aa-bb/source", "valid/aa-bb/target"]
    key = Bigram(420, buckets=1000, seed=4)
    tokens: Counter[int] = Counter()
    buckets: Counter[int] = Counter()
    for name in sections:
        for sentence in stored(store, name):
            framed = [*([] if before is None else [before]), *sentence, *([] if after is None else [after])]
            tokens.update(framed)
            for pair in zip([9, *framed], framed, strict=False):
                a, b = (torch.tensor([one]) for one in pair)
                buckets[int(key.bucket(a, b))] += 1
    found = token_counts(store, 420, sections=sections, before=before, after=after)
    assert found.tolist() == [tokens[i] for i in range(420)]
    pairs = bigram_counts(store, key, first=9, sections=sections, before=before, after=after)
    assert pairs.tolist() == [buckets[i] for i in range(1000)]


def test_all_of_training_where_nothing_is_said(store: TokenStore) -> None:
    everything = token_counts(store, 420)
    sections = ["train/aa-bb/source", "train/aa-bb/target", "train/cc"]
    assert torch.equal(everything, token_counts(store, 420, sections=sections))
    assert int(everything.sum()) == sum(int(store.lengths(name).sum()) for name in sections)


def test_errors(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 50 and a token"):
        token_counts(store, 50)
    with pytest.raises(KeyError, match="no section 'train/zz'"):
        token_counts(store, 420, sections=["train/zz"])
    tokenizer = train_tokenizer(TinySource(), vocab_size=420, cache_dir=tmp_path)
    held_out = cached_store(TinySource(), tokenizer, Wanted(parallel=((AB, "valid"),)), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="none of training, only valid/aa-bb/source"):
        token_counts(held_out, 420)


def test_tables_balance_babel(tmp_path: Path) -> None:
    """Made from the counts of a babel corpus, a balanced table routes that corpus evenly: max / mean under 1.01."""
    source = Babel(BabelSettings(languages=2, train_sentences=3000, valid_sentences=10, test_sentences=10))
    tokenizer = train_tokenizer(source, vocab_size=700, cache_dir=tmp_path)
    wanted = Wanted(monolingual=tuple((language, "train") for language in source.languages))
    store = cached_store(source, tokenizer, wanted, cache_dir=tmp_path)
    counts = token_counts(store, tokenizer.vocab_size)
    assert int(counts.max()) < int(counts.sum()) / 8  # else no table could
    for seed in (0, 1):
        for shuffled in ("equal", "octave"):
            table = balanced_table(counts, 8, seed=seed, shuffled=shuffled)  # type: ignore[arg-type]
            load = torch.zeros(8, dtype=torch.int64).index_add(0, table, counts).double()
            assert load.max() / load.mean() < 1.01
    # And so says a router about the text itself.
    section = store.section(f"train/{source.languages[0]}")
    ids = [t for name in wanted.names() for sentence in stored(store, name) for t in sentence]
    router = routers.hash_layers(8, counts)
    routing = router(torch.zeros(len(ids), 4), RoutingContext(token_ids=torch.tensor(ids)))
    load = routing_stats(routing).load.double()
    assert section.count == 3000
    assert load.max() / load.mean() < 1.01
    # Bigrams are many and small.
    key = Bigram(tokenizer.vocab_size, buckets=4096)
    pairs = bigram_counts(store, key)
    table = balanced_table(pairs, 8)
    load = torch.zeros(8, dtype=torch.int64).index_add(0, table, pairs).double()
    assert load.max() / load.mean() < 1.01
