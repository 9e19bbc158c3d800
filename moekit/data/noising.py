"""Damage to sentences: words dropped, spans filled in, tokens masked.

Pure functions of (sentences, one random key per sentence): a sentence is damaged in the same way whatever stands
beside it in the batch and whichever process does it. Ids marked `protected` (specials, tags) are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moekit.data.keyed import Keys, uniform
from moekit.data.ragged import Ragged

SpanLength = Literal["poisson", "geometric"]

_IGNORE = -100
# Numbers of the independent streams of draws that a key gives.
_COUNT, _LENGTH, _PLACE, _WORD, _KIND, _REPLACEMENT = range(6)


def infill_spans(
    text: Ragged,
    keys: Keys,
    *,
    ratio: float,
    mean_length: float,
    markers: Sequence[int],
    span_length: SpanLength = "poisson",
    protected: NDArray[np.bool_] | None = None,
) -> Ragged:
    """Replace random spans by one marker each.

    Each sentence loses ``ratio * length`` tokens in expectation (rounded up or down at random), at least one token
    stays, and two spans never touch.

    Args:
        text: the sentences.
        keys: UInt64[B].
        ratio: share of tokens that vanish.
        mean_length: of a span; the parameter of the Poisson distribution, whose zeros are not drawn.
        markers: one id (every span gets it), or several: span k of a sentence gets marker k, and no sentence has
            more spans than markers.
        span_length: how lengths are distributed around the mean.
        protected: Bool[N] of tokens that stay; a span that meets one goes on behind it, behind a marker of
            its own where there is another.

    Source: arXiv:1910.13461 section 2.2 (one mask per span, Poisson lengths); `moekit.tasks.span_corruption` has
        T5's rule.
    Differs: spans of length 0 are not drawn (BART inserts a mask for them); spans do not start at word boundaries.
    """
    check_spans(ratio, mean_length)
    if not markers:
        raise ValueError("markers must hold at least one token id: got none.")
    most = len(markers) if len(markers) > 1 else None
    free = text if protected is None else text.keep(~protected)
    in_span = everywhere(_spans(free.lengths, keys, ratio, mean_length, span_length, most), protected)
    return mark_spans(text, first_spans(text, in_span, most), markers).damaged


@dataclass(frozen=True)
class Marked:
    """Text whose spans were replaced by markers.

    Attributes:
        damaged: the text, one marker in the place of each span.
        begins: Bool[N] of the clean text's tokens, True for the first of each span.
        markers: Int64, the marker of each span, in the order of the text.
    """

    damaged: Ragged
    begins: NDArray[np.bool_]
    markers: NDArray[np.int64]


def mark_spans(
    text: Ragged, in_span: NDArray[np.bool_], markers: Sequence[int], begins: NDArray[np.bool_] | None = None
) -> Marked:
    """Put a marker in the place of each span: the one there is, or span k's own.

    Args:
        text: the sentences.
        in_span: Bool[N], True for tokens that go.
        markers: one id, or at least as many as a sentence has spans.
        begins: Bool[N], True for the first token of each span; None = tokens side by side are of one.
    """
    row = text.row
    begins = span_begins(row, in_span) if begins is None else begins
    ordinal = np.cumsum(begins) - 1
    first = np.concatenate([[0], np.cumsum(begins)])[text.starts]
    number = np.minimum(ordinal[begins] - first[row[begins]], len(markers) - 1)
    marked = np.asarray(markers, dtype=np.int64)[number if len(markers) > 1 else np.zeros_like(number)]
    tokens = text.tokens.copy()
    tokens[begins] = marked
    return Marked(Ragged(tokens, text.lengths).keep(~in_span | begins), begins, marked)


def first_spans(text: Ragged, in_span: NDArray[np.bool_], most: int | None) -> NDArray[np.bool_]:
    """The spans that have a marker of their own: the first `most` of each sentence. The rest stays as it is."""
    if most is None or not len(in_span):
        return in_span
    begins = span_begins(text.row, in_span)
    before = np.concatenate([[0], np.cumsum(begins)])
    return in_span & (before[1:] - before[text.starts][text.row] <= most)


def span_begins(row: NDArray[np.int64], in_span: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Bool[N], the first token of each span, where tokens side by side are of one; `row` is that of each token."""
    begins = in_span.copy()
    begins[1:] &= ~(in_span[:-1] & (row[1:] == row[:-1]))
    return begins


def everywhere(chosen: NDArray[np.bool_], protected: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """A choice among tokens that are not protected as one among all."""
    if protected is None:
        return chosen
    out = np.zeros(len(protected), dtype=bool)
    out[~protected] = chosen
    return out


def drop_words(
    text: Ragged,
    keys: Keys,
    *,
    ratio: float,
    starts_word: NDArray[np.bool_],
    protected: NDArray[np.bool_] | None = None,
) -> Ragged:
    """Leave out each word with probability `ratio`, but never all of a sentence.

    Args:
        text: the sentences.
        keys: UInt64[B].
        ratio: chance of a word to vanish.
        starts_word: Bool[vocab], True for ids that begin a word.
        protected: Bool[N] of tokens that stay.

    Source: arXiv:1711.00043 section 2.3.
    """
    check_ratio("ratio", ratio)
    if not len(text.tokens):
        return text
    row, column = text.row, text.column
    begins = starts_word[text.tokens] | (column == 0)
    begin = np.flatnonzero(begins)
    luck = uniform(keys[row[begin]], column[begin], _WORD)
    best = np.zeros(len(text))
    np.maximum.at(best, row[begin], luck)
    stays = (luck >= ratio) | (luck == best[row[begin]])  # the luckiest word always stays
    kept = stays[np.cumsum(begins) - 1]
    return text.keep(kept if protected is None else kept | protected)


def mask_tokens(
    text: Ragged,
    keys: Keys,
    *,
    ratio: float,
    mask_id: int,
    random_ids: tuple[int, int],
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1),
    protected: NDArray[np.bool_] | None = None,
) -> tuple[Ragged, Ragged]:
    """Choose ``ratio * length`` tokens of each sentence, at least one, to be predicted.

    Args:
        text: the sentences.
        keys: UInt64[B].
        ratio: share of tokens to predict.
        mask_id: id of the mask.
        random_ids: (first, last + 1) of the ids that may stand in for a chosen token.
        replace: shares of chosen tokens that become the mask, become a random id (which may be the token's own), stay
            as they are.
        protected: Bool[N] of tokens that are never chosen.

    Returns:
        The damaged sentences, and the labels: the original id at chosen places, -100 elsewhere.

    Source: arXiv:1810.04805 section 3.1.
    """
    check_ratio("ratio", ratio)
    check_shares(replace)
    free = text if protected is None else text.keep(~protected)
    count = np.floor(ratio * free.lengths + uniform(keys, np.zeros(1, dtype=np.int64), _COUNT)).astype(np.int64)
    count = np.minimum(np.maximum(count, 1), free.lengths)
    chosen = everywhere(choose(free.lengths, count, keys, _PLACE), protected)
    labels = np.where(chosen, text.tokens, _IGNORE)
    tokens = text.tokens.copy()
    if replace[0] == 1.0:
        tokens[chosen] = mask_id
    else:
        row, column = text.row[chosen], text.column[chosen]
        kind = uniform(keys[row], column, _KIND)
        low, high = random_ids
        other = low + (uniform(keys[row], column, _REPLACEMENT) * (high - low)).astype(np.int64)
        fate = np.where(kind < replace[0] + replace[1], other, tokens[chosen])
        tokens[chosen] = np.where(kind < replace[0], mask_id, fate)
    return Ragged(tokens, text.lengths), Ragged(labels, text.lengths)


def check_shares(replace: tuple[float, float, float]) -> None:
    """Refuse shares of chosen tokens that do not sum to one.

    Raises:
        ValueError: `replace` is not three shares, none negative, with a sum of 1.
    """
    if len(replace) != 3 or min(replace) < 0 or abs(sum(replace) - 1) > 1e-6:
        raise ValueError(f"replace must be three shares that sum to 1 (mask, random id, unchanged): got {replace}.")


def check_ratio(name: str, ratio: float) -> None:
    """Refuse, under its name, a share of tokens that is none.

    Raises:
        ValueError: `ratio` is not at least 0 and below 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} must be a share of at least 0 and below 1: got {ratio}.")


def check_spans(ratio: float, mean_length: float) -> None:
    """Refuse spans of which there are none.

    Raises:
        ValueError: `ratio` is not at least 0 and below 1, or `mean_length` is below 1.
    """
    check_ratio("ratio", ratio)
    if not mean_length >= 1:
        raise ValueError(f"mean_length must be at least 1 token: got {mean_length}.")


def choose(lengths: NDArray[np.int64], count: NDArray[np.int64], keys: Keys, stream: int) -> NDArray[np.bool_]:
    """Bool[sum(lengths)]: `count` random places of each row."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    column = np.arange(len(row)) - starts[row]
    order = np.argsort(row + uniform(keys[row], column, stream), kind="stable")
    chosen = np.zeros(len(row), dtype=bool)
    chosen[order] = column < count[row]  # sorted by row, so the rank within a row is the column
    return chosen


def _spans(
    lengths: NDArray[np.int64],
    keys: Keys,
    ratio: float,
    mean_length: float,
    distribution: SpanLength,
    most: int | None,
) -> NDArray[np.bool_]:
    """Bool[sum(lengths)]: tokens inside spans."""
    zero = np.zeros(1, dtype=np.int64)
    noise = np.floor(ratio * lengths + uniform(keys, zero, _COUNT)).astype(np.int64)
    noise = np.clip(noise, 0, np.maximum(lengths - 1, 0))
    columns = max(1, int(noise.max(initial=0)))
    drawn = _lengths(uniform(keys[:, None], np.arange(columns), _LENGTH), mean_length, distribution)
    ends = np.minimum(np.cumsum(drawn, axis=1), noise[:, None])
    spans = (np.diff(ends, axis=1, prepend=0) > 0).sum(axis=1)
    # As many spans as there are gaps between the tokens that stay (and markers); the last one takes what is over.
    allowed = np.minimum(spans, lengths - noise + 1 if most is None else np.minimum(lengths - noise + 1, most))
    ends = np.where(np.arange(columns) >= (allowed - 1)[:, None], noise[:, None], ends)
    # Span k stands before clean token number `slot`: choose distinct slots.
    slots = np.where(lengths > 0, lengths - noise + 1, 0)
    chosen = np.flatnonzero(choose(slots, np.minimum(allowed, slots), keys, _PLACE))
    slot_starts = np.cumsum(slots) - slots
    row = np.repeat(np.arange(len(lengths)), slots)[chosen]
    first = np.cumsum(np.bincount(row, minlength=len(lengths))) - np.bincount(row, minlength=len(lengths))
    number = np.arange(len(row)) - first[row]
    before = np.where(number > 0, ends[row, np.maximum(number - 1, 0)], 0)
    starts = np.cumsum(lengths) - lengths
    begin = starts[row] + (chosen - slot_starts[row]) + before
    edges = np.zeros(int(lengths.sum()) + 1, dtype=np.int64)
    np.add.at(edges, begin, 1)
    np.add.at(edges, begin + ends[row, number] - before, -1)
    return np.cumsum(edges[:-1]) > 0


def _lengths(u: NDArray[np.float64], mean: float, distribution: SpanLength) -> NDArray[np.int64]:
    """Span lengths of at least 1 from uniform numbers by the inverse of the distribution function."""
    if distribution == "geometric":
        if mean == 1:
            return np.ones(u.shape, dtype=np.int64)
        return np.maximum(1, np.ceil(np.log1p(-u) / np.log1p(-1 / mean))).astype(np.int64)
    if distribution == "poisson":
        steps = np.arange(1, int(mean + 12 * np.sqrt(mean) + 12))
        mass = np.exp(-mean) * np.cumprod(np.concatenate([[1.0], mean / steps]))
        table = np.cumsum(mass[1:])  # conditioned on at least one
        return 1 + np.minimum(np.searchsorted(table / table[-1], u, side="right"), len(table) - 1)
    raise ValueError(f'span_length must be "poisson" or "geometric": got {distribution!r}.')
