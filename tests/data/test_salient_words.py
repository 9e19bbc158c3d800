"""Salient words against slow, obvious twins that read text word by word; and runs that cut out a user's words."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import TinySource

from moekit.babel import Facts
from moekit.data.batch import Batch
from moekit.data.keyed import fold, key
from moekit.data.module import MultitaskData, TaskData
from moekit.data.ragged import Ragged
from moekit.data.salient import SalientWords, WithSalient
from moekit.data.sources import Union
from moekit.data.spans import corrupt_salient, salient_counts, salient_lengths
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.errors import UserError
from moekit.source import Source
from moekit.tasks import SpanCorruption, SpanCorruptionTask

WORDS = {"aa": ["bada", "bada gogo", "gogo", "dibu", "dibu bada"], "bb": ["kala", "bada"]}
OTHERS = ["badabada", "gidu", "bad", "kala", "-", ",", "gogo,", "bada.", "x1", "bada-dibu"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    class Marked(TinySource):
        def monolingual(self, language: str, split: Any) -> list[str]:
            return [f"{line}, {line}. x1 - y-z" for line in super().monolingual(language, split)]

    return train_tokenizer(Marked(("aa", "bb")), vocab_size=330, cache_dir=tmp_path_factory.mktemp("cache"))


@functools.cache
def _pieces(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def found_slowly(tokenizer: Tokenizer, tokens: list[int], own: list[str]) -> list[tuple[int, int]]:
    """Begin and end of the salient words of one text: at each place the longest, unless an earlier match reaches it."""
    matches = []
    for begin in range(len(tokens)):
        for word in sorted(own, key=lambda word: -len(_pieces(tokenizer, word))):
            end = begin + len(_pieces(tokenizer, word))
            if tuple(tokens[begin:end]) != _pieces(tokenizer, word):
                continue
            behind = tokenizer.piece(tokens[end]) if end < len(tokens) else "▁"
            if behind.startswith("▁") or not any(map(str.isalnum, behind)):
                matches.append((begin, end))
                break
    return [(a, b) for i, (a, b) in enumerate(matches) if all(end <= a for _, end in matches[:i])]


texts = st.lists(st.lists(st.sampled_from([*WORDS["aa"], *OTHERS]), max_size=9).map(" ".join), max_size=6)
seeds = st.integers(0, 2**32)


@given(texts, seeds)
@settings(max_examples=150, deadline=None)
def test_words_are_found_as_a_reader_finds_them(tokenizer: Tokenizer, sentences: list[str], seed: int) -> None:
    finder = SalientWords(WORDS, tokenizer)
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    rng = np.random.default_rng(seed)
    rows = [row[int(rng.integers(3)) :] for row in rows]  # a packed chunk may begin inside a word
    languages = rng.integers(2, size=len(rows))
    found = finder.find(Ragged.of(rows), languages)
    starts = np.cumsum([0, *map(len, rows)])
    expected = [found_slowly(tokenizer, row, WORDS["ab"[n] * 2]) for row, n in zip(rows, languages, strict=True)]
    assert found.number.tolist() == list(map(len, expected))
    places = [(starts[i] + a, b - a, i) for i, spans in enumerate(expected) for a, b in spans]
    assert list(zip(found.start, found.length, found.row, strict=True)) == places


def test_by_hand(tokenizer: Tokenizer) -> None:
    """Whole words alone, the longest of two, with punctuation behind; of one language and not the other."""
    finder = SalientWords(WORDS, tokenizer)

    def words(text: str, language: int) -> list[str]:
        ids = tokenizer.encode(text)
        found = finder.find(Ragged.of([ids]), np.array([language]))
        return [tokenizer.decode(ids[a : a + n]) for a, n in zip(found.start, found.length, strict=True)]

    assert words("gidu bada gogo badabada dibu, kala", 0) == ["bada gogo", "dibu"]
    assert words("gidu bada gogo badabada dibu, kala", 1) == ["bada", "kala"]
    assert words("dibu bada gogo gogo", 0) == ["dibu bada", "gogo"], "one that begins inside another is none"
    assert not words("", 0)
    assert not SalientWords({}, tokenizer).find(Ragged.of([tokenizer.encode("bada")]), np.array([0])).number.any()


def test_words_that_the_vocabulary_cannot_write_are_no_words(tmp_path: Path) -> None:
    """An unknown character is as any other, so that such a word would be found in place of others."""
    corpus = TinySource(("aa", "bb"))
    small = train_tokenizer(corpus, vocab_size=80, cache_dir=tmp_path, byte_fallback=False)
    finder = SalientWords({"aa": ["Ω", "bada"]}, small)
    assert finder.number == 1
    text = Ragged.of([small.encode("Ж bada")])
    assert small.unk_id in text.tokens
    assert finder.find(text, np.array([0])).number.tolist() == [1]


def cut_slowly(
    tokens: list[int], spans: list[tuple[int, int]], markers: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """One text with a marker in the place of each span, and the spans behind their markers."""
    damaged, cut, at = [], [], 0
    for (begin, end), marker in zip(spans, markers, strict=False):
        damaged += [*tokens[at:begin], marker]
        cut += [marker, *tokens[begin:end]]
        at = end
    return damaged + tokens[at:], cut


@given(texts, seeds, st.sampled_from([1.0, 0.5, 0.01]))
@settings(max_examples=150, deadline=None)
def test_words_are_cut_out_whole_and_nothing_else(
    tokenizer: Tokenizer, sentences: list[str], seed: int, share: float
) -> None:
    markers = tokenizer.sentinel_ids[:3]
    rows = [tokenizer.encode(sentence) for sentence in sentences]
    text, keys = Ragged.of(rows), fold(key(seed), np.arange(len(rows)))
    found = SalientWords(WORDS, tokenizer).find(text, np.zeros(len(rows), np.int64))
    damaged, spans = corrupt_salient(text, keys, found, share=share, ratio=0.0, markers=markers)
    for row, left, cut in zip(rows, damaged, spans, strict=True):
        known = found_slowly(tokenizer, row, WORDS["aa"])
        wanted = min(max(1, round(share * len(known))), 3) if known else 0
        assert sum(token in markers for token in cut) == wanted
        if wanted == len(known):
            assert (left.tolist(), cut.tolist()) == cut_slowly(row, known, markers)
        whole = {tuple(row[a:b]) for a, b in known}
        pieces = np.split(cut, np.flatnonzero(np.isin(cut, markers)))[1:]
        assert all(tuple(piece[1:].tolist()) in whole for piece in pieces)
        assert [piece[0] for piece in pieces] == list(markers[:wanted])
        back = {int(piece[0]): piece[1:].tolist() for piece in pieces}
        assert [token for place in left.tolist() for token in back.get(place, [place])] == row
    lengths = salient_lengths(found, share, 3, text.lengths)
    for side, bound, sign in zip((damaged, spans), lengths, (1, 1), strict=True):
        assert (side.lengths <= sign * bound).all()
        if share == 1 and found.number.max(initial=0) <= 3:
            assert side.lengths.tolist() == bound.tolist()


def test_which_words_go_is_drawn_evenly_by_the_key_alone(tokenizer: Tokenizer) -> None:
    row = tokenizer.encode("gogo gidu bada gidu dibu gidu gogo")
    text = Ragged.of([row] * 4000)
    found = SalientWords(WORDS, tokenizer).find(text, np.zeros(len(text), np.int64))
    keys = fold(key(3), np.arange(len(text)))
    cut = functools.partial(corrupt_salient, share=0.5, markers=tokenizer.sentinel_ids)
    damaged, _ = cut(text, keys, found)
    chosen = Counter(tuple(row.tolist()) for row in damaged)
    assert len(chosen) == 6, "two of four"
    assert max(chosen.values()) < 4000 / 6 + 4 * (4000 / 6) ** 0.5
    few = Ragged.of([row] * 5)
    again, _ = cut(few, keys[7:12], SalientWords(WORDS, tokenizer).find(few, np.zeros(5, np.int64)))
    assert [x.tolist() for x in again] == [x.tolist() for x in list(damaged)[7:12]]


def test_a_text_without_salient_words_has_random_spans(tokenizer: Tokenizer) -> None:
    sentences = ["gidu " * 12, "gidu bada " * 3]
    text = Ragged.of([tokenizer.encode(sentence) for sentence in sentences])
    keys = fold(key(1), np.arange(2))
    finder = SalientWords(WORDS, tokenizer)
    task = SpanCorruptionTask(SpanCorruption(salient=1.0), finder)
    damaged, spans = task.span_corruption.apply(text, keys, tokenizer, finder.find(text, np.zeros(2, np.int64)))
    alone = SpanCorruption().apply(Ragged.of(list(text)[:1]), keys[:1], tokenizer)
    assert next(iter(damaged)).tolist() == alone[0].tokens.tolist()
    assert next(iter(spans)).tolist() == alone[1].tokens.tolist()
    sizes = task.text_sizes(text, np.zeros(2, np.int64))
    assert [side.lengths.tolist() for side in (damaged, spans)] == [side.tolist() for side in sizes]


def test_counts() -> None:
    assert salient_counts(np.array([0, 1, 2, 5, 100]), 0.01, 32).tolist() == [0, 1, 1, 1, 1]
    assert salient_counts(np.array([0, 1, 2, 5, 100]), 1.0, 32).tolist() == [0, 1, 2, 5, 32]
    assert salient_counts(np.array([4, 5, 100]), 0.5, 32).tolist() == [2, 2, 32]
    with pytest.raises(ValueError, match=r"salient must be a share of the salient words from 0 to 1: got 1\.5"):
        SpanCorruption(salient=1.5)


# -- as data of a run ----------------------------------------------------------------------------------------------


def made(source: Source, cache: Path, *, packed: bool = False, salient: float = 1.0, **options: Any) -> MultitaskData:
    task = TaskData(span_corruption=SpanCorruption(packed=packed, salient=salient))
    arguments = {"vocab_size": 400, "tokens_per_step": 800, "max_length": 60, "progress": False, **options}
    return MultitaskData(source, tasks={"span_corruption": task}, cache=cache, **arguments)


def named(language: str) -> frozenset[str]:
    """Every third word of the training text, by how often it occurs."""
    ranked = Counter(word for line in TinySource().monolingual(language, "train") for word in line.split())
    return frozenset(word for word, _ in ranked.most_common()[::3])


class Named(TinySource):
    def salient(self, language: str) -> frozenset[str] | None:
        return None if language == "cc" else named(language)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_of_a_run(packed: bool, tmp_path: Path) -> None:
    """Nothing salient is left, and the plan of steps knows what a batch costs before it is made."""
    data = made(Named(), tmp_path, packed=packed)
    tokenizer = data.tokenizer
    loader = iter(data.train_dataloader())
    positions, salient = [], 0
    words = {data.tokenizer.language_id(language): named(language) for language in ("aa", "bb")}
    for _ in range(12):
        batch: Batch = next(loader)["span_corruption"]
        assert batch.target is not None
        positions.append(batch.num_positions)
        for source, target, language in zip(batch.source, batch.target, batch.source_language.tolist(), strict=True):
            marks = [token for token in target.tolist() if token in tokenizer.sentinel_ids]
            assert marks == list(tokenizer.sentinel_ids[: len(marks)])
            cut = set(tokenizer.decode(target.tolist()).split())
            if cut <= words.get(language, frozenset()) and len(marks) < len(tokenizer.sentinel_ids) and not packed:
                salient += 1
                assert not words[language] & set(tokenizer.decode(source.tolist()).split())
    assert salient > 20 or packed
    assert 0.75 * 800 < np.mean(positions) <= 1.02 * 800
    assert max(positions) <= 1.1 * 800
    assert data.summary()["span_corruption"]["padding"] < 0.25
    again = next(iter(made(Named(), tmp_path, packed=packed).train_dataloader()))["span_corruption"]
    first = next(iter(data.train_dataloader()))["span_corruption"]
    assert again.source.equal(first.source)


def test_a_source_without_salient_words_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a corpus that names its salient words: got tiny, which has none"):
        made(TinySource(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_words_that_no_text_has_are_refused(tmp_path: Path) -> None:
    data = made(WithSalient(TinySource(), frozenset({"Bada", "gogogogo"})), tmp_path)
    with pytest.raises(UserError, match=r"of the [\d,]+ texts looked at none has"):
        data.train_dataloader()


def test_a_file_of_words(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("one\n\n  New   York \r\n", encoding="utf-8")
    source = WithSalient.read(TinySource(), str(tmp_path / "words"))
    assert source.salient("aa") == {"one", "New York"}
    assert source.monolingual("aa", "train") == TinySource().monolingual("aa", "train")
    assert source.parallel(source.directions[0], "test") == TinySource().parallel(source.directions[0], "test")
    other = WithSalient(TinySource(), frozenset({"one"}))
    assert len({source.fingerprint(), other.fingerprint(), TinySource().fingerprint()}) == 3
    (tmp_path / "empty").write_text(" \n")
    for name, message in (
        ("empty", "must name at least one word"),
        ("none", "cannot read data.salient"),
        ("", "folder"),
    ):
        with pytest.raises(UserError, match=message):
            WithSalient.read(TinySource(), str(tmp_path / name))


def test_salient_words_of_several_sources_are_those_of_all() -> None:
    facts = Facts(languages=2, entities=20, relations=1, values=3, unknowable=1, train_sentences=1)
    both = Union([facts, TinySource()])
    assert both.salient("avl") == facts.salient("avl")
    assert both.salient("aa") is None
