"""Held-out sentences that are training sentences too, against the slow obvious count."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_corpus import TinySource, stored

from moekit.data import overlap
from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData, TaskData
from moekit.data.overlap import also_in_training
from moekit.data.store import Wanted, store_in_memory
from moekit.data.tokenizer import train_tokenizer
from moekit.source import SPLITS, Direction, Split


class Leaking(TinySource):
    """Some test and validation pairs are training pairs; one German side stands beside another English one."""

    def parallel(self, direction: Direction, split: Split) -> list[tuple[str, str]]:
        own, training = super().parallel(direction, split), super().parallel(direction, "train")
        return [*own, *training[:7], training[3], *training[-2:]] if split != "train" else own

    def monolingual(self, language: str, split: Split) -> list[str]:
        return [*super().monolingual(language, split), "", *super().monolingual("aa", "train")[: 5 * (split == "test")]]


def obvious(store, limits):
    found = {}
    for split, limit in limits.items():
        for language in ("aa", "bb", "cc"):
            held_out, places, training = [], set(), set()
            for name, where in store.sections.items():
                part, stream, *side = name.split("/")
                if (stream if not side else stream.split("-")[side[0] == "target"]) != language:
                    continue
                rows = [tuple(row) for row in stored(store, name)]
                if part == "train":
                    training.update(rows)
                elif part == split and where not in places:
                    places.add(where)
                    held_out += [row for row in rows[:limit] if row]
            if number := sum(row in training for row in held_out):
                found.setdefault(split, {})[language] = (number, len(held_out))
    return found


@pytest.mark.parametrize("chunk", [1 << 14, 7])
@pytest.mark.parametrize("limits", [{"valid": None, "test": None}, {"valid": 45, "test": 3}, {"test": 35}])
def test_it_counts_as_one_would(limits, chunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    source = Leaking()
    tokenizer = train_tokenizer(source, vocab_size=420, cache_dir=tmp_path)
    wanted = Wanted(
        tuple((direction, split) for direction in source.directions for split in SPLITS),
        tuple((language, split) for language in source.languages for split in SPLITS),
    )
    store = store_in_memory(source, tokenizer, wanted)
    found = also_in_training(store, limits)
    assert found == obvious(store, limits)
    assert (found.get("test", {}).keys() == {"aa", "bb", "cc"}) == (limits["test"] != 3)


def test_none_are_none_and_a_run_keeps_the_count(tmp_path: Path) -> None:
    options = {"tasks": {"translation": TaskData()}, "vocab_size": 420, "cache": tmp_path, "progress": False}
    data = MultitaskData(Leaking(), **options)  # type: ignore[arg-type]
    kept = HeldOut.of(data, {})
    assert kept.corpus.repeated is not None
    assert kept.corpus.repeated["test"]["aa"][0] >= 10
    with (tmp_path / "kept").open("wb") as file:
        kept.write(file)
    again = HeldOut.read(tmp_path / "kept").corpus.repeated
    assert again is not None
    assert tuple(again["test"]["aa"]) == kept.corpus.repeated["test"]["aa"]


def test_a_word_order_is_another_sentence(tmp_path: Path) -> None:
    texts = {"train": ["bada gada", "bada", "dada " * 30], "test": ["gada bada", "bada  gada", "dada"]}

    class Orders(TinySource):
        def monolingual(self, language: str, split: Split) -> list[str]:
            return texts.get(split, [])

    source = Orders()
    tokenizer = train_tokenizer(source, vocab_size=304, cache_dir=tmp_path)
    store = store_in_memory(source, tokenizer, Wanted((), tuple(("aa", split) for split in SPLITS)))
    assert also_in_training(store, {"valid": None, "test": None}) == {"test": {"aa": (1, 3)}}


def test_labels_are_no_repeated_sentences(tmp_path: Path) -> None:
    """Answers of a language into itself stand in the training text by their nature; what was asked must not."""

    class Labels(TinySource):
        def parallel(self, direction: Direction, split: Split) -> list[tuple[str, str]]:
            asked = {"train": ["bada gada", "bada", "dada gada"], "test": ["gada bada", "bada"]}
            return [(text, ("gada", "dada")[number % 2]) for number, text in enumerate(asked.get(split, []))]

    source, itself = Labels(("aa",)), Direction("aa", "aa")
    source.directions = (itself,)
    tokenizer = train_tokenizer(source, vocab_size=320, cache_dir=tmp_path)
    store = store_in_memory(source, tokenizer, Wanted(tuple((itself, split) for split in SPLITS), ()))
    assert also_in_training(store, {"test": None}) == {"test": {"aa": (1, 2)}}
