"""Sentences of held-out text that also stand in the training text, where a score says less than it seems to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from moekit.data.keyed import Keys, fold, mix
from moekit.data.store import Section, TokenStore

_CHUNK = 1 << 14  # sentences


def also_in_training(store: TokenStore, limits: Mapping[str, int | None]) -> dict[str, dict[str, tuple[int, int]]]:
    """By split and language: how many held-out sentences are training sentences of the same language, and of how many.

    Sentences are the same where their tokens are: spaces and whatever else the tokenizer normalises do not count. All
    text of a language is compared with all of it, whatever its direction or task; but for the answers of a language
    into itself, which may be labels, all of them in the training text. Time is linear in the text; in memory are 8
    bytes of each held-out sentence, its hash, and a chunk of the text.

    Args:
        store: tokens of all splits.
        limits: at most so many sentences of each section are evaluated, by the splits to look at; None = all.

    Returns:
        Only languages of which some are.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for split, limit in limits.items():
        for language in dict.fromkeys(code for name in store.sections if (code := _language(name))):
            evaluated = {Section(w.first, min(w.count, limit or w.count)) for w in _sections(store, split, language)}
            hashes = np.concatenate(
                [np.zeros(0, np.uint64), *(h for where in evaluated for h in _hashes(store, where))]
            )
            known = np.unique(hashes)
            if not len(known):
                continue
            seen = np.zeros(len(known), dtype=np.bool_)
            for where in set(_sections(store, "train", language)):
                for trained in _hashes(store, where):
                    place = np.minimum(np.searchsorted(known, trained), len(known) - 1)
                    seen[place[known[place] == trained]] = True
            if number := int(seen[np.searchsorted(known, hashes)].sum()):
                found.setdefault(split, {})[language] = (number, len(hashes))
    return found


def _language(section: str) -> str | None:
    """Of ``test/en-de/target`` and ``test/de``; None of ``test/en-en/target``."""
    _, stream, *side = section.split("/")
    if not side:
        return stream
    source, target = stream.split("-")
    return source if side == ["source"] else target if target != source else None


def _sections(store: TokenStore, split: str, language: str) -> list[Section]:
    return [w for name, w in store.sections.items() if name.startswith(f"{split}/") and _language(name) == language]


def _hashes(store: TokenStore, where: Section) -> Iterator[Keys]:
    """UInt64[n], a hash of each sentence that is not empty, a chunk at a time."""
    last = where.first + where.count
    for begin in range(where.first, last, _CHUNK):
        edges: NDArray[np.int64] = np.asarray(store.offsets[begin : min(begin + _CHUNK, last) + 1])
        lengths = np.diff(edges)
        lengths = lengths[lengths > 0]
        if not len(lengths):
            continue
        starts = np.cumsum(lengths) - lengths
        tokens = np.asarray(store.tokens[edges[0] : edges[-1]]).astype(np.uint64)
        place = np.arange(len(tokens)) - np.repeat(starts, lengths)
        words = mix((place.astype(np.uint64) << np.uint64(32)) + tokens)  # a token of 32 bits at a place of 32
        yield fold(np.add.reduceat(words, starts), lengths)
