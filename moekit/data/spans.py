"""Spans that are cut out of texts: at random, as in T5, or the words that carry knowledge.

How many tokens of T5's spans go, in how many, is a function of the length; which, is random. Salient spans are words;
how many there are, and how long they are, depends on the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moekit.data.keyed import Keys
from moekit.data.noising import check_spans, choose, everywhere, first_spans, mark_spans, span_begins
from moekit.data.ragged import Ragged
from moekit.data.salient import WordPlaces

Lengths = NDArray[np.int64]

# Numbers of the independent streams of draws that a key gives.
_NOISE, _CLEAN, _SALIENT = 16, 17, 18


class Counts(NamedTuple):
    """What goes of sentences.

    Attributes:
        noise: Int64[B], tokens that are cut out.
        spans: Int64[B], in so many spans.
    """

    noise: Lengths
    spans: Lengths


def span_counts(lengths: Lengths, ratio: float, mean_length: float, most: Lengths | int | None = None) -> Counts:
    """How many tokens are cut out of sentences of these lengths, and in how many spans.

    noise = round(ratio * length), at least 1 and at most length - 1; spans = round(noise / mean_length), at least 1.
    Halves go to the even number. So a span has the mean length where noise is a multiple of it, and short sentences
    have less: up to 9 tokens lose one, up to 16 two, and up to 23 three, all in one span (15 %, mean 3).

    Args:
        lengths: Int64[B]. A sentence of one token loses nothing.
        ratio: share of tokens; 0 = none.
        mean_length: mean length of a span.
        most: spans that a sentence may have; None = any number.

    Source: arXiv:1910.10683 section 3.1.4, and ``random_spans_noise_mask`` of the authors' code.
    """
    longer = np.maximum(lengths, 2)
    noise = np.clip(np.round(longer * ratio), 1, longer - 1).astype(np.int64)
    noise = np.where((lengths > 1) & (ratio > 0), noise, 0)
    spans = np.maximum(np.round(noise / mean_length).astype(np.int64), 1)
    spans = np.minimum(spans, longer - noise)
    spans = spans if most is None else np.minimum(spans, most)
    return Counts(noise, np.where(noise > 0, spans, 0))


def noise_mask(lengths: Lengths, keys: Keys, counts: Counts) -> NDArray[np.bool_]:
    """Bool[sum(lengths)]: tokens in spans.

    Noise and the tokens that stay are each cut at random into as many parts as there are spans, every way alike, and
    the parts take turns, the tokens that stay first: a sentence begins with one of them and ends with a span.

    Args:
        lengths: Int64[B].
        keys: UInt64[B].
        counts: what goes of sentences of these lengths.

    Source: ``random_spans_noise_mask`` of the authors' code of arXiv:1910.10683.
    """
    parts = np.maximum(counts.spans, (lengths > 0).astype(np.int64))  # without noise: one part that stays
    clean = _segments(lengths - counts.noise, parts, keys, _CLEAN)
    noise = np.zeros_like(clean)
    noise[np.repeat(counts.spans > 0, parts)] = _segments(counts.noise, counts.spans, keys, _NOISE)
    turns = np.stack([clean, noise], axis=1).reshape(-1)
    return np.repeat(np.tile(np.array([False, True]), len(clean)), turns)


def _segments(items: Lengths, parts: Lengths, keys: Keys, stream: int) -> Lengths:
    """Int64[sum(parts)]: sizes of the parts of each row, at least 1 each, every way to cut it alike."""
    cuts = choose(np.maximum(items - 1, 0), np.maximum(parts - 1, 0), keys, stream)
    begins = np.ones(int(items.sum()), dtype=bool)
    first = np.zeros_like(begins)
    first[(np.cumsum(items) - items)[items > 0]] = True
    begins[~first] = cuts
    edges = np.flatnonzero(np.append(begins, True))
    return np.diff(edges)


def corrupt_spans(
    text: Ragged,
    keys: Keys,
    *,
    ratio: float = 0.15,
    mean_length: float = 3.0,
    markers: Sequence[int],
    protected: NDArray[np.bool_] | None = None,
) -> tuple[Ragged, Ragged]:
    """Replace random spans by a marker each, and return what was cut out.

    Args:
        text: the sentences.
        keys: UInt64[B].
        ratio: share of tokens that are cut out; see `span_counts`.
        mean_length: mean length of a span.
        markers: two or more ids: span k of a sentence gets marker k on both sides, and no sentence has more spans.
        protected: Bool[N] of tokens that stay; a span that meets one is two, of which those behind the last marker
            stay.

    Returns:
        The damaged sentences, and for each its spans, every one behind its marker.

    Raises:
        ValueError: if there are fewer than two markers, or no such spans.

    Source: arXiv:1910.10683 section 3.1.4 (15 %, mean 3). Differs: no marker closes the target, as in the authors' code
        and unlike figure 2: the end of the sentence does.
    """
    if len(markers) < 2:
        raise ValueError(f"corrupt_spans needs two or more markers, to tell spans apart: got {len(markers)}.")
    in_span = random_spans(text, keys, ratio, mean_length, len(markers), protected)
    return _cut(text, in_span, span_begins(text.row, in_span), markers)


def random_spans(
    text: Ragged, keys: Keys, ratio: float, mean_length: float, most: int, protected: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Bool[N]: tokens in random spans; arguments as of `corrupt_spans`, `most` spans for a sentence."""
    check_spans(ratio, mean_length)
    free = text if protected is None else text.keep(~protected)
    counts = span_counts(free.lengths, ratio, mean_length, most)
    in_span = everywhere(noise_mask(free.lengths, keys, counts), protected)
    return first_spans(text, in_span, most)  # tokens that stay may have cut spans in two


def salient_counts(there: Lengths, share: float, most: int) -> Lengths:
    """Int64[B]: how many salient words of a text are cut out: ``round(share * there)``, at least 1 of those there are.

    Args:
        there: Int64[B], salient words of the texts.
        share: of them that are cut out.
        most: spans that a text may have.
    """
    wanted = np.clip(np.round(share * there).astype(np.int64), 1, most)
    return np.minimum(wanted, there)


def salient_lengths(found: WordPlaces, share: float, most: int, clean: Lengths) -> tuple[Lengths, Lengths]:
    """Int64[B] each: tokens of texts without salient words, and of these words, a marker for each on both sides.

    Exact where all words go. Where it is a share, which of them go is not known before they are cut out: then the
    shortest that can go are subtracted from the text, and the longest that can go are counted among the words.

    Args:
        found: the salient words.
        share: as of `salient_counts`.
        most: as of `salient_counts`.
        clean: Int64[B], tokens of the texts as they were.
    """
    count = salient_counts(found.number, share, most)
    first = np.cumsum(found.number) - found.number
    sides = []
    for sign in (1, -1):
        order = np.lexsort((sign * found.length, found.row))  # by text, and in it by length
        rank = np.arange(len(order)) - first[found.row]
        used = found.length[order] * (rank < count[found.row])
        sides.append(np.bincount(found.row, weights=used, minlength=len(clean)).astype(np.int64))
    return clean - sides[0] + count, sides[1] + count


def corrupt_salient(
    text: Ragged,
    keys: Keys,
    found: WordPlaces,
    *,
    share: float = 1.0,
    ratio: float = 0.15,
    mean_length: float = 3.0,
    markers: Sequence[int],
    protected: NDArray[np.bool_] | None = None,
) -> tuple[Ragged, Ragged]:
    """Replace salient words by a marker each, and return what was cut out; without such, random spans.

    Args:
        text: the sentences.
        keys: UInt64[B].
        found: their salient words.
        share: of a sentence's salient words that are cut out, at random and at least one; as many as there are markers
            at most.
        ratio: share of tokens that are cut out of sentences without a salient word.
        mean_length: mean length of a span of these sentences.
        markers: two or more ids; see `corrupt_spans`.
        protected: Bool[N] of tokens that stay; see `corrupt_spans`.

    Returns:
        As `corrupt_spans`. Words side by side are a span each.

    Source: arXiv:2002.08909 section 3.4 (salient span masking), arXiv:2002.08910 (for T5). Differs: there one span of a
        sentence goes, here a share; a sentence without any is passed over there.
    """
    chosen = choose(found.number, salient_counts(found.number, share, len(markers)), keys, _SALIENT)
    start, length = found.start[chosen], found.length[chosen]
    begins = np.zeros(len(text.tokens), dtype=bool)
    begins[start] = True
    edges = np.zeros(len(text.tokens) + 1, dtype=np.int64)
    edges[start] += 1
    np.add.at(edges, start + length, -1)
    in_span = np.cumsum(edges[:-1]) > 0
    without = (found.number == 0)[text.row]
    if without.any():
        elsewhere = random_spans(text, keys, ratio, mean_length, len(markers), protected) & without
        in_span, begins = in_span | elsewhere, begins | span_begins(text.row, elsewhere)
    return _cut(text, in_span, begins, markers)


def _cut(
    text: Ragged, in_span: NDArray[np.bool_], begins: NDArray[np.bool_], markers: Sequence[int]
) -> tuple[Ragged, Ragged]:
    """Texts with a marker in the place of each span, and the spans, every one behind its marker."""
    marked = mark_spans(text, in_span, markers, begins)
    # Every span's first token twice: once as its marker.
    copies = in_span.astype(np.int64) + marked.begins
    tokens = np.repeat(text.tokens, copies)
    tokens[(np.cumsum(copies) - copies)[marked.begins]] = marked.markers
    lengths = np.bincount(text.row, weights=copies, minlength=len(text)).astype(np.int64)
    return marked.damaged, Ragged(tokens, lengths)
