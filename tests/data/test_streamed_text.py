"""Text that stays on disk: the same sentences, tokens and steps as of text in memory, and little memory."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from test_module_resume import Recorder
from tiny_corpus import stored

from moekit import stored as stored_files
from moekit.data import store as store_module
from moekit.data import streams as streams_module
from moekit.data import text_stream, tokenizer, usable
from moekit.data.module import MultitaskData, TaskData
from moekit.data.sources import Documents, Text, Union, blocks, first_seen, open_source, streamed
from moekit.data.store import TokenStore, Wanted, build_store, monolingual_section
from moekit.data.streams import open_stream
from moekit.data.text_stream import TextStream, in_chunks
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.data.usable import Usable
from moekit.errors import UserError
from moekit.source import SPLITS, Source, chance


def made_up(count: int, seed: int = 0, words: int = 1) -> list[str]:
    """Sentences of a few words; some come again."""
    rng = random.Random(seed)
    known = ["".join(rng.choice("etaoinshrd") for _ in range(rng.randint(2, 16))) for _ in range(400)]
    lines = [" ".join(rng.choices(known, k=rng.randint(words, 14))) for _ in range(count)]
    return [lines[i // 2] if i % 9 == 0 else line for i, line in enumerate(lines)]


def corpus(folder: Path, lines: Sequence[str]) -> Path:
    """The lines over files of all kinds, in this order."""
    folder.mkdir()
    parts = np.array_split(np.arange(len(lines)), 4)
    first, second, third, fourth = ([lines[i] for i in part] for part in parts)
    (folder / "a.txt").write_text("\n\n".join(first) + "\n \n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        rows = ["\n".join(second[i : i + 5]) for i in range(0, len(second), 5)]
        file.write("".join(json.dumps({"text": row, "url": "x"}) + "\n" for row in rows))
    (folder / "more").mkdir()
    (folder / "more" / "c.txt.gz").write_bytes(gzip.compress("\r\n".join(third).encode()))
    (folder / "more" / "d.json").write_text("".join(json.dumps({"text": line}) + "\n" for line in fourth))
    (folder / "LICENSE").write_text("not text of the corpus\n")
    return folder


class InMemory(Source):
    """The slow, obvious twin: everything held in lists."""

    name = "twin"
    languages = ("en",)
    directions = ()

    def __init__(self, lines: list[str], valid: float, test: float) -> None:
        of = {"valid": lambda c: c < valid, "test": lambda c: c >= 1 - test}
        of["train"] = lambda c: not of["valid"](c) and not of["test"](c)
        self.lines = {s: list(dict.fromkeys(x for x in lines if of[s](chance(x)))) for s in SPLITS}

    def parallel(self, *_: Any) -> list[tuple[str, str]]:
        return []

    def monolingual(self, language: str, split: str) -> list[str]:
        return self.lines[split]

    def fingerprint(self) -> str:
        return "twin"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and chunks of a long text, in a short one."""
    monkeypatch.setattr(blocks, "_BLOCK", 1 << 15)
    monkeypatch.setattr(stored_files, "_BLOCK", 1 << 15)
    monkeypatch.setattr(first_seen, "_IN_MEMORY", 1 << 10)
    monkeypatch.setattr(first_seen, "_CHUNK", 128)
    monkeypatch.setattr(first_seen, "_FILES", 8)
    monkeypatch.setattr(text_stream.in_chunks, "__defaults__", (256, 1 << 16))
    for module in (streams_module, usable):
        monkeypatch.setattr(module, "BLOCK", 512)


WANTED = Wanted(monolingual=tuple(("en", split) for split in SPLITS))


@pytest.mark.parametrize("spilled", [False, True])
def test_sentences_and_tokens_are_those_of_text_in_memory(
    tmp_path: Path, request: pytest.FixtureRequest, spilled: bool
) -> None:
    if spilled:
        request.getfixturevalue("small_pieces")
    lines = made_up(6000)
    source = Documents(corpus(tmp_path / "text", lines), languages=["en"], valid_share=0.05, test_share=0.03)
    twin = InMemory(lines, 0.05, 0.03)
    for split in SPLITS:
        text = source.monolingual("en", split)
        assert isinstance(text, TextStream)
        assert list(text) == twin.lines[split]
        assert len(text) == len(twin.lines[split]) > 100
        for cut in (slice(3), slice(5, 50, 7), slice(None, None, -1), slice(-4, None), slice(9, 2, -3), slice(9, 2)):
            assert text[cut] == twin.lines[split][cut]
        assert [text[0], text[-1], text[17]] == [twin.lines[split][i] for i in (0, -1, 17)]
    trained = [
        train_tokenizer(one, vocab_size=400, cache_dir=tmp_path / one.name, max_sentences=700) for one in (source, twin)
    ]
    assert trained[0].fingerprint == trained[1].fingerprint
    for one, name in ((source, "streamed"), (twin, "held")):
        (tmp_path / name).mkdir()
        build_store(tmp_path / name, one, trained[0], WANTED, progress=False)
    for file in ("tokens.bin", "offsets.bin", "header.json"):
        assert (tmp_path / "streamed" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    valid = TokenStore(tmp_path / "streamed")
    assert stored(valid, "valid/en") == trained[0].encode_batch(twin.lines["valid"])


def batches_of(data: MultitaskData, steps: Sequence[int]) -> list[bytes]:
    items = data.train_dataloader()._items
    return [items[step]["causal_lm"].source.numpy().tobytes() for step in steps]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = InMemory(made_up(2000), 0, 0)
    return train_tokenizer(lines, vocab_size=650, cache_dir=tmp_path_factory.mktemp("vocabulary"))


@pytest.mark.usefixtures("small_pieces")
def test_memory_does_not_grow_with_the_text(tmp_path: Path, vocabulary: Tokenizer) -> None:
    lines = made_up(24_000, words=13)
    folder = corpus(tmp_path / "text", lines)
    size = sum(len(line) + 1 for line in lines)
    assert size > 3_000_000
    del lines
    tracemalloc.start()
    try:
        source = Documents(folder, languages=["en"])
        data = MultitaskData(
            source, tasks={"causal_lm": TaskData()}, cache=tmp_path / "cache", tokenizer=vocabulary,
            tokens_per_step=256, max_length=32, progress=False,
        )  # fmt: skip
        found = batches_of(data, (0, 1, 700))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Held in a list, the text would take its bytes and some 50 for each sentence, and its lengths 24 for each.
    assert peak < size / 3, f"{peak:,} bytes for text of {size:,}"
    again = MultitaskData(
        Documents(folder, languages=["en"]), tasks={"causal_lm": TaskData()}, cache=tmp_path / "cache",
        tokenizer=vocabulary, tokens_per_step=256, max_length=32, progress=False,
    )  # fmt: skip
    assert batches_of(again, (700, 1, 0)) == found[::-1]


def test_a_run_on_it_resumes_with_the_same_batches(tmp_path: Path, vocabulary: Tokenizer) -> None:
    folder = corpus(tmp_path / "text", made_up(1500))

    def fitted(steps: int, checkpoint: Path | None) -> tuple[list[str], L.Trainer]:
        data = MultitaskData(
            Documents(folder, languages=["en"]), tasks={"causal_lm": TaskData()}, cache=tmp_path / "cache",
            tokenizer=vocabulary, tokens_per_step=300, steps_per_epoch=100, progress=False,
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        )  # fmt: skip
        module = Recorder()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module.seen, trainer

    whole, _ = fitted(7, None)
    begun, trainer = fitted(3, None)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    went_on, _ = fitted(7, tmp_path / "last.ckpt")
    assert begun + went_on == whole
    assert len(set(whole)) == 7
    (folder / "e.txt").write_text("a new file\n")
    with pytest.raises(UserError, match=r"must have the data settings of its checkpoint.*data\.source"):
        fitted(9, tmp_path / "last.ckpt")


def test_interrupted_preparation_begins_where_its_last_part_began(
    tmp_path: Path, vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = corpus(tmp_path / "text", made_up(800)), tmp_path / "cache"

    def data() -> MultitaskData:
        source = Documents(folder, languages=["en"])
        return MultitaskData(
            source, tasks={"causal_lm": TaskData()}, cache=cache, tokenizer=vocabulary, progress=False
        )  # fmt: skip

    def interrupted(chunks: Any, *_: Any) -> Iterator[list[str]]:
        yield from list(in_chunks(chunks))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "in_chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data().prepare_data()
    assert [path for path in (cache / "stores").iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setattr(streamed, "choose", None)  # that part was done, and is not done again
    made = data()
    made.prepare_data()
    assert made.store.sections["train/en"].count > 500
    bits = next((cache / "texts").glob("*/*.train.bits"))
    bits.write_bytes(bytes(len(bits.read_bytes())))
    with pytest.raises(TypeError, match="not callable"):  # damage is found, and that part is done again
        data().source.prepare(cache)


def test_text_that_changes_while_it_is_read(tmp_path: Path, vocabulary: Tokenizer) -> None:
    folder = corpus(tmp_path / "text", made_up(200))
    source = Documents(folder, languages=["en"])
    text = source.monolingual("en", "train")
    (folder / "a.txt").write_text("another\n")
    with pytest.raises(UserError, match=r"a\.txt: the file must stay as it is while it is read"):
        list(text)

    class Growing(InMemory):
        def monolingual(self, language: str, split: str) -> Any:
            return TextStream(lambda: iter(["a", "b"]), 3, split)

    (tmp_path / "store").mkdir()
    with pytest.raises(UserError, match=r"must be the same each time it is read: en train had 3 sentences, and then 2"):
        build_store(tmp_path / "store", Growing([], 0, 0), vocabulary, WANTED, progress=False)


def test_splits_patterns_units_and_languages(tmp_path: Path) -> None:
    folder = tmp_path / "de"
    for name, text in {
        "train-00001.txt": "a\nb\n\nc\n", "x/valid/part.txt": "v\n", "web-test.00000.jsonl": '{"body": "t\\n\\nu"}\n',
        "web.jsonl": '{"body": "one\\n two\\n\\nthree"}\n\n{"body": ""}\n',
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def found(path: Any, **settings: Any) -> dict[str, list[str]]:
        source = open_source("documents", path, text_field="body", **settings)
        (language,) = source.languages
        return {language: [list(source.monolingual(language, split)) for split in SPLITS]}

    assert found(folder) == {"de": [["a", "b", "c", "one", "two", "three"], ["v"], ["t", "u"]]}
    assert found(folder, unit="paragraph") == {"de": [["a b", "c", "one two", "three"], ["v"], ["t", "u"]]}
    rows = found(str(folder / "*.jsonl"), unit="document", languages=["fr"], valid_share=0)
    assert rows == {"fr": [["one two three"], [], ["t u"]]}
    assert found(str(folder / "**" / "*.txt"), languages=["fr"], test_share=0) == {"fr": [["a", "b", "c"], ["v"], []]}
    # What stands before the first star is where the pattern begins, not a split.
    pattern = str(folder / "x" / "valid" / "*.txt")
    assert found(pattern, languages=["fr"], valid_share=0, test_share=0) == {"fr": [["v"], [], []]}
    assert found(folder / "train-00001.txt", languages=["fr"], valid_share=0, test_share=0) == {
        "fr": [["a", "b", "c"], [], []]
    }
    assert Documents(folder, text_field="body").fingerprint() != (
        Documents(folder, text_field="body", unit="paragraph").fingerprint()
    )


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"a.md": "x"}, {}, r"files must end in \.txt.*found none among 1"),
        ({"a.txt": "x"}, {"languages": ["en", "de"]}, "must be of one language: got en, de"),
        ({"a.txt": "x"}, {"languages": None}, r"which language the text of .* is.*--data\.languages"),
        ({"a.txt": " \n\n"}, {}, "train files must hold text: got 1 without any"),
        ({"a.txt": "x"}, {"unit": "word"}, "unit must be line, paragraph or document: got 'word'"),
        ({"a.txt": "x"}, {"unit": "document"}, r"a\.txt: a document must be a row of a \.jsonl file"),
        ({"a.txt": "x"}, {"valid_share": 0.7}, "valid_share must be at least 0 and below 0.5"),
        ({"a.jsonl": '{"text": "x"}\n{"txt": 1}'}, {}, r'line 2: .*under the key "text": got the keys txt'),
        ({"a.jsonl": '{"text": 3}'}, {}, r"line 1: .*got int there\. data\.text_field"),
        ({"a.jsonl": "[1]"}, {}, r"line 1: .*got list"),
        ({"a.jsonl": '{"text": "x"}\nx'}, {}, r"line 2, column 1: the line must be JSON"),
        ({"a.txt": b"good\n" * 20_000 + b"b\xffd\n"}, {}, r"line 20001, byte 2 of the line: text must be UTF-8"),
        ({"a.txt": b"good\n" * 20_000 + b"b\0d\n"}, {}, r"line 20001, byte 2 of the line: .*NUL"),
        ({"a.txt.gz": gzip.compress(b"x\n" * 50_000)[:-20]}, {}, r"must be a whole gzip archive"),
        ({"a.txt.bz2": b"no archive"}, {}, r"must be a whole bzip2 archive"),
        ({"a.txt": b""}, {}, r"must hold at least one line: got an empty file"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("small_pieces")
def test_what_is_wrong_is_named(tmp_path: Path, files: dict[str, Any], settings: Any, message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        Documents(tmp_path, **{"languages": ["en"], **settings})
    with pytest.raises(UserError, match="there is nothing at"):
        Documents(tmp_path / "away" / "*.txt", languages=["en"])


def test_a_byte_order_mark_counts_at_the_beginning_alone(tmp_path: Path, small_pieces: None) -> None:
    text = "\ufeff" + "abc\n" * 10_000 + "\ufeffend\n"
    (tmp_path / "train.en").write_text(text)
    found = list(Text(tmp_path, valid_share=0, test_share=0).monolingual("en", "train"))
    assert found == ["abc", "\ufeffend"]


def test_several_sources_give_each_sentence_once(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, text in zip(folders, ("a\nb\na\n", "b\nc\n"), strict=True):
        folder.mkdir()
        (folder / "train.en").write_text(text)
    both = Union([Text(folder, valid_share=0, test_share=0) for folder in folders])
    found = both.monolingual("en", "train")
    assert isinstance(found, TextStream)
    assert list(found) == ["a", "b", "c"]
    assert both.monolingual("en", "train") is found


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 12), ("truncate", 10_000)])
def test_a_stream_says_what_arrays_would(tmp_path: Path, small_pieces: None, too_long: Any, kept: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 20, size=(2, 3000))

    class Counted(Tokenizer):
        vocab_size = 300

        def __init__(self) -> None: ...

        def encode_batch(self, texts: Sequence[str], **_: Any) -> list[list[int]]:
            return [[7] * int(text) for text in texts]

    class Numbers(InMemory):
        def monolingual(self, language: str, split: str) -> list[str]:
            return list(map(str, lengths[int(split == "valid")]))

    wanted = Wanted(monolingual=(("en", "train"), ("en", "valid")))
    build_store(tmp_path, Numbers([], 0, 0), Counted(), wanted, progress=False)
    store = TokenStore(tmp_path)
    sections = [monolingual_section("en", split) for split in ("train", "valid")]
    for limit in (None, 1000):
        stream = open_stream(store, "x", sections, (0, 0), max_length=14, too_long=too_long, limit=limit)
        whole = lengths[:, :limit]
        index = np.flatnonzero((whole > 0).all(0) & (whole <= kept).all(0))
        assert (len(stream), stream.dropped) == (len(index), whole.shape[1] - len(index))
        assert stream.truncated == int((whole[:, index] > 12).any(0).sum())
        expected = np.minimum(whole[:, index], 12)
        assert np.array_equal(np.concatenate(list(stream.lengths()), axis=1), expected)
        which = rng.permutation(len(index))[:400]
        found = stream.at(which)
        assert np.array_equal(found.index, index[which])
        assert np.array_equal(found.lengths, expected[:, which])
        starts = np.stack([store.starts(section)[index] for section in sections])
        assert np.array_equal(found.starts, starts[:, which])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_usable_numbers_are_those_of_flatnonzero(size: int) -> None:
    chosen = np.random.default_rng(size).random(size) < 0.6
    found = Usable([chosen])
    assert len(found) == chosen.sum()
    assert np.array_equal(found.at(np.arange(len(found))), np.flatnonzero(chosen))
    assert len(Usable([])) == 0


def test_the_sample_of_a_tokenizer_is_bounded_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer._spread(["ab"] * 9, 100) == ["ab"] * 9
    numbered = [f"{i:03}" for i in range(1000)]
    spread = tokenizer._spread(numbered, 300)
    assert spread == numbered[::16]  # 63 sentences: with every eighth there would be 125, of 375 characters
    monkeypatch.setattr(tokenizer, "_LONG", 100)
    first, second = (tokenizer._drawn(500, 80, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert len(set(first.tolist())) == 80
    assert 0 <= first[0] < 60 < 440 < first[-1] < 500
    lines = TextStream(lambda: iter(numbered), 1000, "numbered")
    assert list(tokenizer._picked(lines, first)) == [numbered[i] for i in first]
