from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import TinySource

from moekit.data.cache import CorruptCacheError
from moekit.data.tokenizer import NUM_SENTINELS, Tokenizer, _training_sentences, train_tokenizer
from moekit.errors import UserError

SIZE = 420


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tokenizer(cache: Path) -> Tokenizer:
    return train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=cache)


def test_special_ids_are_where_the_contract_says(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert len(tokenizer.sentinel_ids) == NUM_SENTINELS
    assert [tokenizer._processor.id_to_piece(i) for i in range(7)] == [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<mask>",
        "<extra_0>",
        "<extra_1>",
    ]
    tags = [tokenizer.tag_id(language) for language in ("aa", "bb", "cc")]
    assert [tokenizer._processor.id_to_piece(i) for i in tags] == ["<2aa>", "<2bb>", "<2cc>"]
    assert [tokenizer.language_id(language) for language in ("aa", "bb", "cc")] == [0, 1, 2]
    assert tokenizer.first_text_id == max(tags) + 1


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_text_survives_a_round_trip(model: str, cache: Path) -> None:
    source = TinySource()
    trained = train_tokenizer(source, vocab_size=SIZE, cache_dir=cache, model=model)  # type: ignore[arg-type]
    texts = [line for language in source.languages for line in source.monolingual(language, "test")]
    assert [trained.decode(ids) for ids in trained.encode_batch(texts)] == texts
    assert trained.encode_batch(texts[:3]) == [trained.encode(text) for text in texts[:3]]


def test_text_never_encodes_to_specials_and_specials_never_decode(tokenizer: Tokenizer) -> None:
    text = "<mask> badi <2bb> <extra_3> </s> <pad>"
    ids = tokenizer.encode(text)
    assert min(ids) >= tokenizer.first_text_id
    assert tokenizer.decode(ids) == text
    specials = [*range(tokenizer.first_text_id)]
    specials.remove(tokenizer.unk_id)
    assert tokenizer.decode([*specials, *ids, *specials]) == text


def test_bytes_spell_unknown_characters_unless_switched_off(cache: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("badi ☃ 猫")) == "badi ☃ 猫"
    without = train_tokenizer(TinySource(), vocab_size=320, cache_dir=cache, byte_fallback=False)
    assert without.unk_id in without.encode("badi ☃")
    assert "⁇" in without.decode(without.encode("badi ☃"))


def test_word_starts_are_the_pieces_after_a_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("badi goga dugi")
    assert sum(tokenizer.starts_word[i] for i in ids) == 3
    assert not tokenizer.starts_word[: tokenizer.first_text_id].any()


def test_same_settings_come_from_the_cache_and_train_the_same_model(
    cache: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path)
    assert fresh.fingerprint == tokenizer.fingerprint
    monkeypatch.setattr("moekit.data.tokenizer._train", lambda *_, **__: pytest.fail("trained again"))
    assert train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=cache).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 1.0}, {"vocab_size": 410}, {"model": "bpe"}])
def test_other_settings_or_other_text_are_other_tokenizers(change: dict[str, object], tmp_path: Path) -> None:
    settings = {"vocab_size": SIZE, "cache_dir": tmp_path, "seed": 0, **change}
    train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path)
    train_tokenizer(TinySource(), **settings)  # type: ignore[arg-type]
    train_tokenizer(TinySource(seed=1), vocab_size=SIZE, cache_dir=tmp_path)
    assert sum(path.is_dir() for path in (tmp_path / "tokenizers").iterdir()) == 3


def test_temperature_evens_out_the_languages() -> None:
    class Uneven(TinySource):
        def monolingual(self, language: str, split: str) -> list[str]:  # type: ignore[override]
            return super().monolingual(language, "train")[: {"aa": 400, "bb": 100, "cc": 4}[language]]

    def counts(temperature: float) -> list[int]:
        source = Uneven()
        own = [set(source.monolingual(language, "train")) for language in source.languages]
        chosen = _training_sentences(source, temperature, 504, seed=0)
        return [sum(line in lines for line in chosen) for lines in own]

    by_size, even = counts(1.0), counts(1e6)
    assert by_size == [400, 100, 4]
    assert even == [168, 168, 168]  # a small language repeats, a large one is thinned out
    assert counts(5.0)[2] == pytest.approx(504 * 4**0.2 / (4**0.2 + 100**0.2 + 400**0.2), abs=1)


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_a_vocabulary_too_large_names_the_largest_that_works(model: str, tmp_path: Path) -> None:
    source = TinySource(scale=0.05)
    arguments = {"cache_dir": tmp_path, "model": model}
    with pytest.raises(UserError, match=r"data\.vocab_size must be at most \d+.*got 20000") as caught:
        train_tokenizer(source, vocab_size=20_000, **arguments)  # type: ignore[arg-type]
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_tokenizer(source, vocab_size=largest, **arguments).vocab_size == largest  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at most"):
        train_tokenizer(source, vocab_size=largest + 1, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [20, 100, 310])
def test_a_vocabulary_too_small_says_what_it_must_hold(wanted: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.vocab_size must be .*got {wanted}") as caught:
        train_tokenizer(TinySource(), vocab_size=wanted, cache_dir=tmp_path)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert train_tokenizer(TinySource(), vocab_size=least, cache_dir=tmp_path).vocab_size == least
    assert [path.name for path in (tmp_path / "tokenizers").iterdir() if path.name.startswith(".")] == []


def test_no_text_at_all_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs text: the source 'tiny' has no training sentence"):
        train_tokenizer(TinySource(scale=0.0), vocab_size=SIZE, cache_dir=tmp_path)


def test_an_unknown_language_names_the_nearest(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"'aaa'.*Did you mean 'aa'.*aa, bb, cc"):
        tokenizer.tag_id("aaa")


def test_save_load_and_pickle_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    for again in (Tokenizer.load(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.languages == tokenizer.languages
        assert again.encode("badi goga") == tokenizer.encode("badi goga")


def _cut(folder: Path) -> None:
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    model = bytearray((folder / "tokenizer.model").read_bytes())
    model[len(model) // 2] ^= 1
    (folder / "tokenizer.model").write_bytes(bytes(model))


def _no_header(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _broken_header(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"format": 1, "lang')


def _other_format(folder: Path) -> None:
    header = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**header, "format": 99}))


def _empty(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _no_header, _broken_header, _other_format, _empty])
def test_a_damaged_tokenizer_is_refused_by_name_and_rebuilt_in_the_cache(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path)
    (folder,) = (path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir())
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CorruptCacheError, match=re.escape(str(folder))):
        Tokenizer.load(folder)
    after = train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path)
    assert after.fingerprint == before.fingerprint
    assert "built again" in caplog.text
    assert Tokenizer.load(folder).fingerprint == before.fingerprint


def test_a_model_of_another_maker_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="must begin with the special tokens of moekit for aa, zz"):
        Tokenizer(tokenizer._model, ["aa", "zz"])


def test_settings_of_the_trainer_are_part_of_the_cache_key(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"byte_fallback": False}, {"character_coverage": 0.99}, {"normalization": "nmt_nfkc_cf"}
    ]  # fmt: skip
    made = [train_tokenizer(TinySource(), vocab_size=350, cache_dir=tmp_path, **change) for change in changes]
    assert len([path for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()]) == len(changes)
    assert made[3].decode(made[3].encode("BADA")) == "bada"
    assert made[0].decode(made[0].encode("BADA")) == "BADA"
    with pytest.raises(UserError, match=r"data\.character_coverage must be a share from 0\.98 to 1: got 1\.5"):
        train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path, character_coverage=1.5)
    with pytest.raises(UserError, match=r"data\.normalization_rule_name must be one of nmt_nfkc, .*: got 'nfd'"):
        train_tokenizer(TinySource(), vocab_size=SIZE, cache_dir=tmp_path, normalization="nfd")
