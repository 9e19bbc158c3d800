"""Span corruption against T5's rule, written as a loop over one sentence; and packed chunks."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.data.keyed import fold, key
from moekit.data.noising import infill_spans
from moekit.data.ragged import Ragged
from moekit.data.spans import corrupt_spans, noise_mask, span_counts
from moekit.errors import UserError
from moekit.tasks.span_corruption import SpanCorruption

MASK, FIRST, VOCAB = 4, 40, 1000
SENTINELS = tuple(range(5, 37))

rows = st.lists(st.lists(st.integers(FIRST, VOCAB - 1), min_size=0, max_size=60), min_size=0, max_size=8)
seeds = st.integers(0, 2**32)


def keys(count: int, seed: int = 0) -> Any:
    return fold(key(seed), np.arange(count))


def lists(text: Ragged) -> list[list[int]]:
    return [row.tolist() for row in text]


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """The first half of ``random_spans_noise_mask``, for one sentence. Python rounds halves to even, as TensorFlow."""
    length = max(length, 2)
    noise = round(length * density)
    noise = min(max(noise, 1), length - 1)
    spans = max(round(noise / mean), 1)
    return noise, spans


def t5_segments(items: int, segments: int, rng: np.random.Generator) -> list[int]:
    first = np.arange(items - 1) < segments - 1
    rng.shuffle(first)
    sizes = [1]
    for begins in first:
        if begins:
            sizes.append(1)
        else:
            sizes[-1] += 1
    return sizes


def t5_mask(length: int, density: float, mean: float, rng: np.random.Generator) -> tuple[bool, ...]:
    """``random_spans_noise_mask`` of text-to-text-transfer-transformer, as a loop."""
    noise, spans = t5_counts(length, density, mean)
    gone = t5_segments(noise, spans, rng)
    stays = t5_segments(max(length, 2) - noise, spans, rng)
    mask: list[bool] = []
    for clean, cut in zip(stays, gone, strict=True):
        mask += [False] * clean + [True] * cut
    return tuple(mask[:length])


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 10.0), (0.3, 1.0)])
def test_counts_are_t5s(density: float, mean: float) -> None:
    lengths = np.arange(2, 700)
    noise, spans = span_counts(lengths, density, mean)
    for i, length in enumerate(lengths):
        assert (noise[i], spans[i]) == t5_counts(int(length), density, mean)


@pytest.mark.parametrize(("length", "density", "mean"), [(8, 0.5, 2.0), (10, 0.4, 2.0), (12, 0.35, 2.0)])
def test_masks_are_distributed_as_t5s(length: int, density: float, mean: float) -> None:
    """Chi-square of two samples over all masks that occur."""
    draws = 6000
    lengths = np.full(draws, length)
    flat = noise_mask(lengths, keys(draws), span_counts(lengths, density, mean))
    ours = collections.Counter(tuple(row) for row in flat.reshape(draws, length).tolist())
    rng = np.random.default_rng(0)
    theirs = collections.Counter(t5_mask(length, density, mean, rng) for _ in range(draws))
    both = set(ours) | set(theirs)
    assert len(both) > 8
    chi_square = sum((ours[m] - theirs[m]) ** 2 / (ours[m] + theirs[m]) for m in both)
    freedom = len(both) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_the_mean_span_is_three_where_there_is_room() -> None:
    """A span of 3 on chunks; on sentences of a few tokens what 15 % of them are."""
    for length, mean in ((568, 3.0), (128, 19 / 6), (60, 3.0), (20, 3.0), (16, 2.0), (9, 1.0), (5, 1.0)):
        lengths = np.full(200, length)
        text = Ragged(np.full(200 * length, FIRST), lengths)
        _, spans = corrupt_spans(text, keys(200), markers=SENTINELS)
        markers = int((spans.tokens < FIRST).sum())
        assert (len(spans.tokens) - markers) / markers == pytest.approx(mean, abs=0.05)


@given(rows, seeds, st.sampled_from([0.0, 0.15, 0.7]), st.sampled_from([1, 3]), st.sampled_from([2, 32]))
@settings(max_examples=200, deadline=None)
def test_cut_out_spans_put_back_give_the_clean_sentence(
    sentences: list[list[int]], seed: int, ratio: float, mean: int, markers: int
) -> None:
    own = keys(len(sentences), seed)
    damaged, spans = corrupt_spans(
        Ragged.of(sentences), own, ratio=ratio, mean_length=mean, markers=SENTINELS[:markers]
    )
    for clean, row, cut in zip(sentences, lists(damaged), lists(spans), strict=True):
        pieces: dict[int, list[int]] = {}
        for token in cut:
            if token in SENTINELS:
                assert token not in pieces, "a sentinel stands for one span"
                pieces[token] = []
            else:
                pieces[next(reversed(pieces))].append(token)
        assert list(pieces) == list(SENTINELS[: len(pieces)])
        assert all(pieces.values()), "no span is empty"
        if len(clean) > 1 and ratio:
            noise, wanted = t5_counts(len(clean), ratio, mean)
            assert sum(map(len, pieces.values())) == noise
            assert len(pieces) == min(wanted, len(clean) - noise, markers)
            assert row[-1] in SENTINELS
        else:
            assert not pieces
        assert list(itertools.chain.from_iterable(pieces.pop(t, [t]) for t in row)) == clean
        assert not pieces


@given(rows, seeds)
@settings(max_examples=60, deadline=None)
def test_sizes_are_known_before_anything_is_drawn(sentences: list[list[int]], seed: int) -> None:
    text = Ragged.of(sentences)
    damaged, spans = corrupt_spans(text, keys(len(sentences), seed), markers=SENTINELS)
    for found, expected in zip((damaged, spans), SpanCorruption().lengths(text.lengths), strict=True):
        assert found.lengths.tolist() == expected.tolist()


@given(rows, seeds)
@settings(max_examples=60, deadline=None)
def test_protected_tokens_stay_and_no_marker_is_used_twice(sentences: list[list[int]], seed: int) -> None:
    framed = [[38, *row[: len(row) // 2], 3, *row[len(row) // 2 :], 2] for row in sentences]
    text = Ragged.of(framed)
    damaged, spans = corrupt_spans(
        text, keys(len(framed), seed), ratio=0.7, mean_length=1, markers=SENTINELS[:5], protected=text.tokens < FIRST
    )
    for row, cut in zip(lists(damaged), lists(spans), strict=True):
        assert (row[0], row[-1]) == (38, 2)
        assert 3 in row
        markers = [token for token in cut if token in SENTINELS]
        assert len(markers) == len(set(markers))


def test_many_unknown_tokens_neither_share_markers_nor_join_spans() -> None:
    """A text with more protected tokens than there are markers has spans of the mean length as any other."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(FIRST, VOCAB, size=569)
    tokens[rng.random(569) < 0.1] = 3
    text = Ragged.of([tokens.tolist()] * 20)
    damaged, spans = corrupt_spans(text, keys(20), markers=SENTINELS, protected=text.tokens < FIRST)
    assert (damaged.tokens == 3).sum() == (tokens == 3).sum() * 20
    for row in lists(spans):
        markers = [token for token in row if token in SENTINELS]
        assert markers == list(SENTINELS[: len(markers)])
        assert len(markers) > 20
        assert (len(row) - len(markers)) / len(markers) <= 3.0


def test_infilling_with_sentinels_uses_each_once() -> None:
    text = Ragged.of([[50, 3] * 60])
    damaged = infill_spans(
        text, keys(1), ratio=0.9, mean_length=9, markers=SENTINELS[:4], protected=text.tokens < FIRST
    )
    assert [token for token in lists(damaged)[0] if token in SENTINELS] == list(SENTINELS[:4])


def test_noise_depends_on_the_sentence_and_its_key_alone() -> None:
    rng = np.random.default_rng(0)
    sentences = [rng.integers(FIRST, VOCAB, size=n).tolist() for n in (30, 44, 3, 90)]
    own, picked = keys(4), np.array([2, 0])
    together = lists(corrupt_spans(Ragged.of(sentences), own, markers=SENTINELS)[0])
    alone = lists(corrupt_spans(Ragged.of([sentences[i] for i in picked]), own[picked], markers=SENTINELS)[0])
    assert alone == [together[i] for i in picked]
    assert lists(corrupt_spans(Ragged.of(sentences), keys(4, seed=9), markers=SENTINELS)[0]) != together


def test_a_chunk_leaves_as_many_positions_as_there_are() -> None:
    """568 tokens leave 511, and 114 with the end of the sentence to predict: the numbers of T5's code for 512."""
    noise = SpanCorruption()
    assert noise.chunk(511) == 568
    damaged, cut = noise.lengths(np.array([568, 569]))
    assert damaged.tolist() == [511, 512]
    assert cut[0] + 1 == 114
    for tokens in (1, 2, 5, 30, 126):
        assert noise.lengths(np.array([noise.chunk(tokens)]))[0] <= tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be a share of at least 0 and below 1: got 1\.0"),
        ({"mean_length": 0.5}, r"mean_length must be at least 1 token: got 0\.5"),
        ({"markers": (MASK,)}, "needs two or more markers, to tell spans apart: got 1"),
    ],
)
def test_impossible_spans_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"ratio": 0.3, "mean_length": 3.0, "markers": SENTINELS, **change}
    with pytest.raises(ValueError, match=message):
        corrupt_spans(Ragged.of([list(range(FIRST, FIRST + 9))]), keys(1), **arguments)


def test_more_spans_than_sentinels_are_refused_before_anything_is_made() -> None:
    SpanCorruption(packed=True).check(510)
    with pytest.raises(UserError, match=r"needs a sentinel for each span: a text of \d+ tokens has \d\d spans"):
        SpanCorruption(packed=True).check(700)
