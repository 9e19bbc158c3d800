from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_corpus import TinySource, stored

from moekit.data.cache import CorruptCacheError, check_contents
from moekit.data.store import TokenStore, Wanted, build_store, cached_store
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.source import Direction

AB, BA, AC = (Direction.parse(name) for name in ("aa-bb", "bb-aa", "aa-cc"))
WANTED = Wanted(
    parallel=((AB, "train"), (BA, "train"), (AC, "train"), (AB, "valid")),
    monolingual=(("aa", "train"), ("bb", "valid")),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return train_tokenizer(TinySource(), vocab_size=420, cache_dir=cache)


@pytest.fixture(scope="module")
def store(cache: Path, tokenizer: Tokenizer) -> TokenStore:
    return cached_store(TinySource(), tokenizer, WANTED, cache_dir=cache)


def test_every_section_holds_its_sentences(store: TokenStore, tokenizer: Tokenizer) -> None:
    source = TinySource()
    for direction, split in WANTED.parallel:
        pairs = source.parallel(direction, split)
        for side, name in enumerate(("source", "target")):
            section = f"{split}/{direction}/{name}"
            assert stored(store, section) == [tokenizer.encode(pair[side]) for pair in pairs]
            assert store.lengths(section).tolist() == [len(tokenizer.encode(pair[side])) for pair in pairs]
    for language, split in WANTED.monolingual:
        decoded = [tokenizer.decode(ids) for ids in stored(store, f"{split}/{language}")]
        assert decoded == source.monolingual(language, split)


def test_equal_sides_are_stored_once(store: TokenStore) -> None:
    sections = store.sections
    english = {
        sections[name] for name in ("train/aa-bb/source", "train/bb-aa/target", "train/aa-cc/source", "train/aa")
    }
    assert len(english) == 1
    assert len(store.offsets) == 3 * 400 + 2 * 40 + 1


def test_any_sentences_are_read_in_the_order_asked_for(store: TokenStore) -> None:
    everything = [store.tokens[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    wanted = np.array([5, 900, 5, 0, len(store.offsets) - 2])
    starts, lengths = store.offsets[wanted], np.diff(store.offsets)[wanted]
    rows = store.read(starts, lengths)
    assert [row.tolist() for row in rows] == [everything[i] for i in wanted]
    short = store.read(starts, np.array([2, 1, 0, 3, 2]))
    assert [row.tolist() for row in short] == [everything[i][:n] for i, n in zip(wanted, [2, 1, 0, 3, 2], strict=True)]
    assert len(store.read(starts[:0], lengths[:0]).tokens) == 0


def test_a_large_vocabulary_takes_wider_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    class Large:
        vocab_size = 70_000
        fingerprint = "large"

        def encode_batch(self, texts: list[str], **_: Any) -> list[list[int]]:
            return [[69_999, len(text)] for text in texts]

    large: Any = Large()
    wide = cached_store(TinySource(), large, Wanted(monolingual=(("aa", "test"),)), cache_dir=tmp_path)
    assert wide.dtype == np.uint32
    assert stored(wide, "test/aa")[0][0] == 69_999
    assert cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path).dtype == np.uint16


def test_the_cache_is_used_and_its_key_is_the_content(
    cache: Path, tokenizer: Tokenizer, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = cached_store(TinySource(seed=1), tokenizer, WANTED, cache_dir=cache)
    fewer = cached_store(TinySource(), tokenizer, Wanted(monolingual=(("aa", "test"),)), cache_dir=cache)
    assert len({store.folder, other.folder, fewer.folder}) == 3
    monkeypatch.setattr("moekit.data.store.build_store", lambda *_, **__: pytest.fail("built again"))
    assert cached_store(TinySource(), tokenizer, WANTED, cache_dir=cache).folder == store.folder


def test_a_store_travels_to_another_process_by_its_path(store: TokenStore) -> None:
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert len(pickle.loads(data).tokens) == len(store.tokens)


def test_sources_without_a_split_make_empty_sections(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = cached_store(TinySource(scale=0.0), tokenizer, Wanted(monolingual=(("aa", "train"),)), cache_dir=tmp_path)
    assert (len(empty.offsets), len(empty.tokens), len(empty.lengths("train/aa"))) == (1, 0, 0)


def test_an_unknown_section_lists_those_there_are(store: TokenStore) -> None:
    with pytest.raises(KeyError, match=r"no section 'train/zz'.*valid/bb"):
        store.section("train/zz")


def _cut_tokens(folder: Path) -> None:
    path = folder / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])


def _cut_offsets(folder: Path) -> None:
    path = folder / "offsets.bin"
    path.write_bytes(path.read_bytes()[:-8])


def _flip_offset(folder: Path) -> None:
    data = bytearray((folder / "offsets.bin").read_bytes())
    data[80] ^= 4
    (folder / "offsets.bin").write_bytes(bytes(data))


def _flip_token(folder: Path) -> None:
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[101] ^= 1
    (folder / "tokens.bin").write_bytes(bytes(data))


def _no_tokens(folder: Path) -> None:
    (folder / "tokens.bin").unlink()


def _no_header(folder: Path) -> None:
    (folder / "header.json").unlink()


def _broken_header(folder: Path) -> None:
    (folder / "header.json").write_text("{")


def _other_format(folder: Path) -> None:
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "format": 0}))


def _swap_sections(folder: Path) -> None:
    """Other text, of as many sentences: nothing but the list of contents can tell."""
    header = json.loads((folder / "header.json").read_text())
    sections = header["sections"]
    sections["train/aa-bb/source"], sections["train/aa-bb/target"] = (
        sections["train/aa-bb/target"],
        sections["train/aa-bb/source"],
    )
    (folder / "header.json").write_text(json.dumps(header))


def _type_of_pointers(folder: Path) -> None:
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "dtype": "O"}))


def _no_list(folder: Path) -> None:
    (folder / "contents.json").unlink()


def _list_of_nothing(folder: Path) -> None:
    (folder / "contents.json").write_text(json.dumps({"folder": folder.name, "files": {}}))


def _folder_for_file(folder: Path) -> None:
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").mkdir()


def _dangling_link(folder: Path) -> None:
    (folder / "tokens.bin").unlink()
    (folder / "tokens.bin").symlink_to(folder / "nowhere")


DAMAGE = {
    _cut_tokens: "tokens.bin",
    _cut_offsets: "offsets.bin",
    _flip_offset: "offsets.bin",
    _flip_token: "tokens.bin",
    _no_tokens: "tokens.bin",
    _no_header: "header.json",
    _broken_header: "header.json",
    _other_format: "header.json",
    _swap_sections: "header.json",
    _type_of_pointers: "header.json",
    _no_list: "contents.json",
    _list_of_nothing: "header.json",
    _folder_for_file: "tokens.bin",
    _dangling_link: "tokens.bin",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_store_is_refused_by_name_and_rebuilt_in_the_cache(
    damage: Any, tmp_path: Path, tokenizer: Tokenizer, store: TokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    own = cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path)
    damage(own.folder)
    with pytest.raises(CorruptCacheError, match=re.escape(str(own.folder)) + ".*" + re.escape(DAMAGE[damage])):
        check_contents(own.folder)
    again = cached_store(TinySource(), tokenizer, WANTED, cache_dir=tmp_path)
    assert "built again" in caplog.text
    assert again.sections == store.sections
    np.testing.assert_array_equal(again.tokens, store.tokens)


def test_a_store_under_the_name_of_another_is_built_again(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """As a copied cache may have it: whole, and of the test set, where training text belongs."""
    train, test = (Wanted(monolingual=(("aa", split),)) for split in ("train", "test"))
    right = cached_store(TinySource(), tokenizer, train, cache_dir=tmp_path)
    tokens = np.array(right.tokens)
    other = cached_store(TinySource(), tokenizer, test, cache_dir=tmp_path)
    shutil.rmtree(right.folder)
    shutil.copytree(other.folder, right.folder)
    again = cached_store(TinySource(), tokenizer, train, cache_dir=tmp_path)
    assert "built under another name. It is built again." in caplog.text
    np.testing.assert_array_equal(again.tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "O"}, "tokens are of type uint16 or uint32, not 'O'"),
        ({"dtype": ["uint16"]}, "tokens are of type uint16 or uint32"),
        ({"sections": {"train/aa": [0, 10**6]}}, "section train/aa lies outside of"),
        ({"sections": {"train/aa": [-1, 1]}}, "section train/aa lies outside of"),
        ({"sections": {"train/aa": 3}}, "it cannot be read"),
        ({"sections": 3}, "it cannot be read"),
        ({"files": {}}, "it cannot be read"),
        ({"files": {"tokens.bin": {"size": 2}, "offsets.bin": {"size": 9}}}, "hold no whole numbers"),
        ({"files": {"tokens.bin": {"size": 2}, "offsets.bin": {"size": 16}}}, "lies outside of 1 sentences"),
        (
            {"files": {"tokens.bin": {"size": 2}, "offsets.bin": {"size": 16}}, "sections": {}},
            r"tokens\.bin must have 2 bytes: it has [\d,]+",
        ),
        ({"format": 0}, "must have format 1: got 0"),
    ],
)
def test_a_header_of_no_store_is_refused(change: Any, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    build_store(tmp_path, TinySource(), tokenizer, WANTED, progress=False)
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps({**header, **change}))
    with pytest.raises(CorruptCacheError, match=message):
        TokenStore(tmp_path)


def test_building_reports_progress_only_on_a_terminal(
    tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    build_store(tmp_path / "store", TinySource(), tokenizer, WANTED)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
