"""Hash tables: the same everywhere, balanced where frequencies allow it."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from moekit.functional.hash_tables import (
    balanced_table,
    clustered_table,
    dealt_table,
    dispersed_table,
    hash_ids,
    random_table,
)
from moekit.testing import skewed_tokens

V, E = 600, 8


def literal_hash(*ids: int, seed: int = 0) -> int:
    """The hash in Python's whole numbers, which never overflow."""
    word = 2**32

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x = (x ^ (x >> shift)) * factor % word
        return x ^ (x >> 15)

    state = mix(mix((seed + 0x9E3779B9) % word) ^ ((seed // word) % word))
    for one in ids:
        state = mix((state + 0x9E3779B9) % word ^ one)
    return state


def zipf_counts(size: int = V, total: int = 200_000) -> Tensor:
    """Falling frequencies, in an order that is not sorted."""
    rank = hash_ids(torch.arange(size), seed=5).argsort(stable=True)
    return total // (rank + 10)


COUNTS, EMBEDDINGS = zipf_counts(), skewed_tokens(V, 6)


def loads(table: Tensor, counts: Tensor, num_experts: int = E) -> Tensor:
    return torch.zeros(num_experts, dtype=torch.int64).index_add(0, table, counts)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40 + 1])
def test_hash_is_the_literal_one(seed: int) -> None:
    first = torch.tensor([0, 1, 2, 12345, 2**31 - 1, 2**32 - 1])
    second = torch.tensor([9, 0, 2**32 - 1, 77, 5, 1])
    expected = [literal_hash(a, b, seed=seed) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    assert hash_ids(first, second, seed=seed).tolist() == expected
    assert hash_ids(first.to(torch.int32)[:4], seed=seed).tolist() == [
        literal_hash(a, seed=seed) for a in first[:4].tolist()
    ]


def test_hash_looks_random() -> None:
    """Every bit is set about half of the time; one changed bit of an id changes about half of the bits."""
    ids = torch.arange(4096)
    words = hash_ids(ids)
    bits = (words[:, None] >> torch.arange(32)) & 1
    assert (bits.float().mean(0) - 0.5).abs().max() < 0.04
    for place in range(12):
        flipped = words ^ hash_ids(ids ^ (1 << place))
        changed = ((flipped[:, None] >> torch.arange(32)) & 1).float().mean(0)
        assert (changed - 0.5).abs().max() < 0.05
    assert len(set(hash_ids(ids, torch.zeros_like(ids)).tolist()) & set(words.tolist())) < 10


def test_tables_never_change() -> None:
    """Sums of tables as first written: a model trained with one finds it again wherever it is made anew."""
    tables = {
        "random": random_table(V, E, seed=1),
        "dealt": dealt_table(V, E, seed=1),
        "balanced": balanced_table(COUNTS, E, seed=1),
        "octave": balanced_table(COUNTS, E, seed=1, shuffled="octave"),
    }
    found = {name: zlib.crc32(bytes(table.tolist())) for name, table in tables.items()}
    assert found == PINNED


PINNED = {"random": 232459227, "dealt": 1180689776, "balanced": 1530710186, "octave": 2200408933}


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: random_table(V, E, seed=seed),
        lambda seed: dealt_table(V, E, seed=seed),
        lambda seed: balanced_table(COUNTS, E, seed=seed),
        lambda seed: balanced_table(COUNTS, E, seed=seed, shuffled="octave"),
        lambda seed: clustered_table(EMBEDDINGS, E, seed=seed),
        lambda seed: dispersed_table(EMBEDDINGS, E, seed=seed),
    ],
    ids=["random", "dealt", "balanced", "octave", "clustered", "dispersed"],
)
def test_a_function_of_arguments_and_seed(make) -> None:  # type: ignore[no-untyped-def]
    state = torch.get_rng_state()
    table = make(3)
    torch.manual_seed(99)
    with torch.device("meta"):
        again = make(3)
    assert again.device.type == "cpu"
    assert torch.equal(table, again)
    assert table.dtype == torch.int64
    assert table.shape == (V,)
    assert int(table.min()) >= 0
    assert int(table.max()) < E
    assert not torch.equal(table, make(4))
    torch.set_rng_state(state)


def test_random_is_uniform_and_dealt_is_even() -> None:
    sizes = torch.bincount(random_table(8000, E), minlength=E)
    assert sizes.min() > 900
    assert sizes.max() < 1100
    assert not torch.equal(sizes, sizes[:1].expand(E))
    assert torch.bincount(dealt_table(43, E)).tolist() == [6, 6, 6, 5, 5, 5, 5, 5]


def literal_balanced(counts: list[int], num_experts: int, seed: int) -> list[int]:
    """By falling count, ties by the hash; to the least loaded expert, the first of equal ones."""
    load, table = [0] * num_experts, [-1] * len(counts)
    for key in sorted(range(len(counts)), key=lambda k: (-counts[k], literal_hash(k, seed=seed))):
        if counts[key]:
            table[key] = min(range(num_experts), key=lambda e: load[e])
            load[table[key]] += counts[key]
    return table


def test_balanced_is_the_literal_greedy() -> None:
    counts = zipf_counts(150)
    table = balanced_table(counts, E, seed=2)
    expected = literal_balanced(counts.tolist(), E, 2)
    assert [t for t, n in zip(table.tolist(), counts.tolist(), strict=True) if n] == [t for t in expected if t >= 0]


@pytest.mark.parametrize("shuffled", ["equal", "octave"])
def test_balanced_loads(shuffled: str) -> None:
    for num_experts in (2, 8, 13):
        table = balanced_table(COUNTS, num_experts, shuffled=shuffled)  # type: ignore[arg-type]
        load = loads(table, COUNTS, num_experts).double()
        assert load.max() / load.mean() < 1.01


def test_no_table_splits_a_frequent_token() -> None:
    counts = torch.tensor([1000, 3, 2, 1, 1, 1])
    table = balanced_table(counts, 3)
    assert loads(table, counts, 3).sort().values.tolist() == [4, 4, 1000]


def test_tokens_that_never_occurred_are_dealt() -> None:
    counts = torch.zeros(40, dtype=torch.int64)
    counts[:4] = torch.tensor([5, 4, 1, 1])
    assert torch.bincount(balanced_table(counts, 4)).tolist() == [10] * 4
    assert torch.bincount(balanced_table(torch.zeros(9, dtype=torch.int32), 4)).tolist() == [3, 2, 2, 2]


def test_octave_mixes_frequent_tokens() -> None:
    """Two tables of "equal" put the same frequent tokens together, two of "octave" do not."""
    frequent = COUNTS.argsort(descending=True)[:64]

    def shared(shuffled: str) -> float:
        first, second = (balanced_table(COUNTS, E, seed=s, shuffled=shuffled)[frequent] for s in (0, 1))  # type: ignore[arg-type]
        together = [(t[:, None] == t).triu(1) for t in (first, second)]
        return float((together[0] & together[1]).sum() / together[0].sum())

    assert shared("equal") > 0.9
    assert shared("octave") < 0.4


def test_clusters_are_found_and_dispersed() -> None:
    """Well separated groups: clustered puts each at an expert of its own, dispersed spreads each over all."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(V) % E
    embeddings = 20.0 * torch.eye(E)[group] + torch.randn(V, E, generator=generator)
    clustered = clustered_table(embeddings, E)
    owner = {(int(g), int(c)) for g, c in zip(group, clustered, strict=True)}
    assert len(owner) == E
    assert len({c for _, c in owner}) == E
    dispersed = dispersed_table(embeddings, E)
    for g in range(E):
        sizes = torch.bincount(dispersed[group == g], minlength=E)
        assert int(sizes.max() - sizes.min()) <= 1
    sizes = torch.bincount(dispersed, minlength=E)
    assert int(sizes.max() - sizes.min()) <= 1


def test_every_cluster_has_members() -> None:
    """Equal embeddings, and as many clusters as keys."""
    assert torch.bincount(clustered_table(torch.zeros(10, 3), 4), minlength=4).min() >= 1
    assert sorted(clustered_table(torch.randn(6, 2), 6).tolist()) == list(range(6))
    assert clustered_table(torch.randn(5, 2), 1).tolist() == [0] * 5


def test_k_means_improves_on_its_start() -> None:
    """Every row is nearest to the mean of its own cluster: a fixed point of Lloyd's algorithm."""
    x = skewed_tokens(300, 4, dtype=torch.float64)
    table = clustered_table(x, 6)
    means = torch.stack([x[table == e].mean(0) for e in range(6)])
    assert torch.equal(torch.cdist(x, means).argmin(1), table)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"counts Int\[V\]: got torch.float32"):
        balanced_table(torch.ones(4), 2)
    with pytest.raises(ValueError, match="at least 0: got -1"):
        balanced_table(torch.tensor([3, -1]), 2)
    with pytest.raises(ValueError, match='"equal" or "octave"'):
        balanced_table(torch.tensor([3, 1]), 2, shuffled="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one key and one expert: got 0 and 2"):
        random_table(0, 2)
    with pytest.raises(ValueError, match="got 3 and 0"):
        dealt_table(3, 0)
    with pytest.raises(ValueError, match="3 embeddings for 4 experts"):
        clustered_table(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="finite embeddings"):
        dispersed_table(torch.full((5, 2), float("nan")), 2)
    with pytest.raises(ValueError, match="on meta"):
        balanced_table(torch.ones(4, dtype=torch.int64, device="meta"), 2)
