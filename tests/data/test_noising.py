from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.data.keyed import fold, key, permute, uniform
from moekit.data.noising import drop_words, infill_spans, mask_tokens
from moekit.data.ragged import Ragged
from moekit.tasks import ELECTRA, Masking

MASK, FIRST, VOCAB = 4, 40, 1000
SENTINELS = tuple(range(5, 37))

rows = st.lists(st.lists(st.integers(FIRST, VOCAB - 1), min_size=0, max_size=25), min_size=0, max_size=8)
seeds = st.integers(0, 2**32)


def keys(count: int, seed: int = 0) -> Any:
    return fold(key(seed), np.arange(count))


def corpus(lengths: np.ndarray[Any, Any], seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged(rng.integers(FIRST, VOCAB, size=int(lengths.sum())), lengths.astype(np.int64))


def lists(text: Ragged) -> list[list[int]]:
    return [row.tolist() for row in text]


@given(
    rows,
    seeds,
    st.sampled_from([0.0, 0.15, 0.3, 0.7]),
    st.sampled_from([1, 3]),
    st.sampled_from(["poisson", "geometric"]),
)
@settings(max_examples=200, deadline=None)
def test_infilled_sentences_are_the_clean_ones_with_spans_cut_out(
    sentences: list[list[int]], seed: int, ratio: float, mean: int, kind: Any
) -> None:
    own = keys(len(sentences), seed)
    noised = infill_spans(Ragged.of(sentences), own, ratio=ratio, mean_length=mean, markers=(MASK,), span_length=kind)
    assert len(noised) == len(sentences)
    for clean, row in zip(sentences, lists(noised), strict=True):
        assert _matches(row, clean)
        assert not any(a == b == MASK for a, b in itertools.pairwise(row)), "two spans must not touch"
        kept = sum(token != MASK for token in row)
        most = max(0, len(clean) - 1)  # something must stay
        assert len(clean) - kept in {min(most, int(ratio * len(clean))), min(most, int(ratio * len(clean)) + 1)}
        assert ratio or row == clean


def _matches(row: list[int], clean: list[int]) -> bool:
    """Whether `clean` follows from `row` by putting one or more tokens in the place of each mask."""
    if not row:
        return not clean
    if row[0] == MASK:
        return any(_matches(row[1:], clean[n:]) for n in range(1, len(clean) + 1))
    return bool(clean) and row[0] == clean[0] and _matches(row[1:], clean[1:])


@given(rows, seeds)
@settings(max_examples=80, deadline=None)
def test_sentinels_count_up_and_fill_in_to_the_clean_sentence(sentences: list[list[int]], seed: int) -> None:
    text, own = Ragged.of(sentences), keys(len(sentences), seed)
    with_sentinels = lists(infill_spans(text, own, ratio=0.5, mean_length=2, markers=SENTINELS))
    with_masks = lists(infill_spans(text, own, ratio=0.5, mean_length=2, markers=(MASK,)))
    for row, masked in zip(with_sentinels, with_masks, strict=True):
        found = [token for token in row if token in SENTINELS]
        assert found == list(SENTINELS[: len(found)])
        assert [MASK if token in SENTINELS else token for token in row] == masked


def test_no_sentence_needs_more_markers_than_there_are() -> None:
    text = corpus(np.full(20, 60))
    for row in lists(
        infill_spans(text, keys(20), ratio=0.5, mean_length=1, markers=(5, 6, 7), span_length="geometric")
    ):
        assert [token for token in row if token < FIRST] == [5, 6, 7]
        assert len(row) == 30 + 3


@pytest.mark.parametrize("kind", ["poisson", "geometric"])
@pytest.mark.parametrize(("ratio", "mean"), [(0.15, 3.0), (0.3, 3.0), (0.5, 2.0)])
def test_spans_have_the_expected_share_and_length(kind: Any, ratio: float, mean: float) -> None:
    lengths = np.random.default_rng(1).integers(20, 60, size=2000)
    text = corpus(lengths)
    noised = infill_spans(text, keys(2000), ratio=ratio, mean_length=mean, markers=(MASK,), span_length=kind)
    spans = int((noised.tokens == MASK).sum())
    gone = len(text.tokens) - (len(noised.tokens) - spans)
    # The number of noise tokens is ratio * length up to a fair rounding: its deviation is below 1/2 a sentence.
    assert abs(gone - ratio * lengths.sum()) < 4 * 0.5 * np.sqrt(2000)
    # The last span of a sentence is cut where the count is reached, hence the lower bound.
    drawn = mean / (1 - np.exp(-mean)) if kind == "poisson" else mean
    assert 0.72 * drawn < gone / spans < 1.02 * drawn


def test_spans_fall_everywhere_alike() -> None:
    text = corpus(np.full(4000, 20))
    text = Ragged(np.tile(np.arange(FIRST, FIRST + 20), 4000), text.lengths)
    noised = infill_spans(text, keys(4000), ratio=0.3, mean_length=3, markers=(MASK,))
    seen = np.bincount(noised.tokens[noised.tokens != MASK] - FIRST, minlength=20) / 4000
    assert seen.mean() == pytest.approx(0.7, abs=1e-9)
    assert seen[4:-4] == pytest.approx(0.67, abs=0.05)
    assert seen.min() > 0.55
    assert seen.max() < 0.9


@given(rows, seeds, st.sampled_from([0.0, 0.1, 0.9]))
@settings(max_examples=80, deadline=None)
def test_dropped_words_are_whole_words_and_never_all(sentences: list[list[int]], seed: int, ratio: float) -> None:
    starts_word = np.arange(VOCAB) % 2 == 0
    out = lists(drop_words(Ragged.of(sentences), keys(len(sentences), seed), ratio=ratio, starts_word=starts_word))
    for clean, row in zip(sentences, out, strict=True):
        assert bool(row) == bool(clean)
        if ratio == 0.0:
            assert row == clean
        rest = iter(_words(clean, starts_word))
        assert all(word in rest for word in _words(row, starts_word)), "words in order, each whole"


def _words(row: list[int], starts_word: Any) -> list[tuple[int, ...]]:
    words: list[list[int]] = []
    for token in row:
        if not words or starts_word[token]:
            words.append([])
        words[-1].append(token)
    return [tuple(word) for word in words]


def test_words_drop_at_the_rate_asked_for() -> None:
    text = corpus(np.full(1000, 30))
    out = drop_words(text, keys(1000), ratio=0.2, starts_word=np.ones(VOCAB, dtype=bool))
    assert len(out.tokens) / 30_000 == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 30_000))


@given(rows, seeds, st.sampled_from([(1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.0, 0.5, 0.5)]))
@settings(max_examples=100, deadline=None)
def test_labels_say_what_stood_at_the_chosen_places(sentences: list[list[int]], seed: int, replace: Any) -> None:
    text = Ragged.of(sentences)
    masked, labels = mask_tokens(
        text, keys(len(sentences), seed), ratio=0.15, mask_id=MASK, random_ids=(FIRST, VOCAB), replace=replace
    )
    assert masked.lengths.tolist() == labels.lengths.tolist() == text.lengths.tolist()
    chosen = labels.tokens != -100
    np.testing.assert_array_equal(labels.tokens[chosen], text.tokens[chosen])
    np.testing.assert_array_equal(masked.tokens[~chosen], text.tokens[~chosen])
    count = np.bincount(text.row[chosen], minlength=len(sentences))
    for clean, chosen_here in zip(sentences, count, strict=True):
        assert (
            chosen_here in {max(1, int(0.15 * len(clean))), int(0.15 * len(clean)) + 1} if clean else chosen_here == 0
        )
    if replace[0] == 1.0:
        assert (masked.tokens[chosen] == MASK).all()
    else:
        assert ((masked.tokens[chosen] == MASK) | (masked.tokens[chosen] >= FIRST)).all()


def test_masking_has_the_expected_shares() -> None:
    text = corpus(np.full(3000, 40))
    masked, labels = mask_tokens(text, keys(3000), ratio=0.15, mask_id=MASK, random_ids=(FIRST, VOCAB))
    chosen = labels.tokens != -100
    count = int(chosen.sum())
    assert count == 3000 * 6
    became = masked.tokens[chosen]
    for share, observed in (
        (0.8, (became == MASK).mean()),
        (0.1 * 959 / 960, ((became != MASK) & (became != text.tokens[chosen])).mean()),
        (0.1 + 0.1 / 960, (became == text.tokens[chosen]).mean()),
    ):
        assert observed == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / count))
    by_place = np.bincount(text.column[chosen], minlength=40) / 3000
    assert by_place == pytest.approx(0.15, abs=4.5 * np.sqrt(0.15 * 0.85 / 3000))


@given(rows, seeds)
@settings(max_examples=80, deadline=None)
def test_protected_tokens_are_never_touched(sentences: list[list[int]], seed: int) -> None:
    framed = [[38, *row, 2] for row in sentences]
    text, own = Ragged.of(framed), keys(len(framed), seed)
    protected = text.tokens < FIRST
    starts_word = np.arange(VOCAB) % 2 == 0
    spans = infill_spans(text, own, ratio=0.5, mean_length=2, markers=(MASK,), protected=protected)
    words = drop_words(text, own, ratio=0.9, starts_word=starts_word, protected=protected)
    masked, labels = mask_tokens(
        text, own, ratio=0.9, mask_id=MASK, random_ids=(FIRST, VOCAB), replace=(0.5, 0.5, 0.0), protected=protected
    )
    for row in (*lists(spans), *lists(words), *lists(masked)):
        assert row[0] == 38
        assert row[-1] == 2
    assert (labels.tokens[protected] == -100).all()


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_sentences_keep_something_to_go_by(length: int) -> None:
    text = corpus(np.full(500, length))
    noised = infill_spans(text, keys(500), ratio=0.3, mean_length=3, markers=(MASK,))
    assert all(any(token != MASK for token in row) for row in lists(noised))
    if length == 1:
        np.testing.assert_array_equal(noised.tokens, text.tokens)
    _, labels = mask_tokens(text, keys(500), ratio=0.15, mask_id=MASK, random_ids=(FIRST, VOCAB))
    assert (np.bincount(text.row[labels.tokens != -100]) == 1).all()


def test_noise_depends_on_the_sentence_and_its_key_alone() -> None:
    text, own = corpus(np.array([9, 14, 3, 30])), keys(4)
    picked = np.array([2, 0])
    rows = [row for row in text]
    alone = Ragged.of([rows[i].tolist() for i in picked])
    noise: list[Any] = [
        lambda t, k: infill_spans(t, k, ratio=0.3, mean_length=3, markers=(MASK,)),
        lambda t, k: drop_words(t, k, ratio=0.3, starts_word=np.ones(VOCAB, dtype=bool)),
        lambda t, k: mask_tokens(t, k, ratio=0.3, mask_id=MASK, random_ids=(FIRST, VOCAB))[0],
    ]
    for apply in noise:
        together = lists(apply(text, own))
        assert lists(apply(alone, own[picked])) == [together[i] for i in picked]
        assert lists(apply(text, keys(4, seed=9))) != together


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be a share of at least 0 and below 1: got 1\.0"),
        ({"mean_length": 0.5}, r"mean_length must be at least 1 token: got 0\.5"),
        ({"markers": ()}, "markers must hold at least one token id"),
        ({"span_length": "uniform"}, "span_length must be"),
    ],
)
def test_impossible_spans_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"ratio": 0.3, "mean_length": 3.0, "markers": (MASK,), **change}
    with pytest.raises(ValueError, match=message):
        infill_spans(corpus(np.array([9])), keys(1), **arguments)


def test_masking_is_berts_and_the_generators_is_electras() -> None:
    """arXiv:1810.04805 section 3.1: 80 % mask, 10 % random, 10 % unchanged; arXiv:2003.10555 section 2: the mask."""
    assert (Masking().ratio, Masking().replace) == (0.15, (0.8, 0.1, 0.1))
    assert (ELECTRA.ratio, ELECTRA.replace) == (0.15, (1.0, 0.0, 0.0))


def test_random_ids_are_drawn_alike() -> None:
    """From all text ids, the token's own among them."""
    text = corpus(np.full(4000, 20))
    masked, labels = mask_tokens(
        text, keys(4000), ratio=0.5, mask_id=MASK, random_ids=(FIRST, FIRST + 10), replace=(0.0, 1.0, 0.0)
    )
    drawn = masked.tokens[labels.tokens != -100] - FIRST
    expected = len(drawn) / 10
    assert ((np.bincount(drawn, minlength=10) - expected) ** 2 / expected).sum() < 27.9  # 99.9 %, 9 degrees of freedom


def test_the_same_tokens_are_chosen_whatever_becomes_of_them() -> None:
    text, own = corpus(np.full(50, 30)), keys(50)
    found = [
        mask_tokens(text, own, ratio=0.15, mask_id=MASK, random_ids=(FIRST, VOCAB), replace=shares)
        for shares in ((1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.8, 0.1, 0.1))
    ]
    labels = [pair[1].tokens.tolist() for pair in found]
    assert labels[0] == labels[1] == labels[2]
    assert found[1][0].tokens.tolist() == found[2][0].tokens.tolist() != found[0][0].tokens.tolist()


def test_impossible_masking_is_refused() -> None:
    with pytest.raises(ValueError, match="three shares that sum to 1"):
        Masking(replace=(0.8, 0.1, 0.0))
    with pytest.raises(ValueError, match="three shares that sum to 1"):
        mask_tokens(corpus(np.array([9])), keys(1), ratio=0.1, mask_id=4, random_ids=(40, 50), replace=(0.8, 0.1, 0.2))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permute_is_a_permutation_and_its_keys_differ(size: int) -> None:
    once, again = (permute(np.arange(size), size, key(seed)) for seed in (0, 1))
    assert sorted(once) == list(range(size))
    assert size < 5 or once.tolist() != again.tolist()


def test_permute_serves_many_sizes_and_keys_at_once() -> None:
    sizes, own = np.array([7, 1, 300, 7]), keys(4)
    index = np.array([3, 0, 299, 3])
    singly = [int(permute(index[i : i + 1], int(sizes[i]), own[i : i + 1])[0]) for i in range(4)]
    assert permute(index, sizes, own).tolist() == singly


def test_permutations_send_every_place_everywhere() -> None:
    size, draws = 12, 6000
    where = permute(np.full(draws, 5), size, keys(draws))
    expected = draws / size
    chi_square = ((np.bincount(where, minlength=size) - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 99.9 % point of chi-square with 11 degrees of freedom


def test_uniform_draws_are_uniform_and_unrelated() -> None:
    draws = uniform(keys(500)[:, None], np.arange(40), 0)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 99.9 %, 19 degrees of freedom
    other = uniform(keys(500)[:, None], np.arange(40), 1)
    for a, b in ((draws, other), (draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
