"""Our vocabulary opened by transformers: the same ids and the same text, marks where they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_models import shake
from transformers import AutoTokenizer

from moekit.data.sources import Babel, BabelSettings
from moekit.data.tokenizer import SpecialTokens, Tokenizer, train_tokenizer
from moekit.errors import UserError
from moekit.huggingface import export_model, read_tokenizer
from moekit.huggingface.tokenizers import write_tokenizer
from moekit.transformer import EncoderDecoder, RMSNorm

SIZE = 480
ODD = (
    "  two  spaces and\ttabs ", "Ünïcödé, ﬁ ligatures and ½", "日本語 と 한국어", "new\u00a0space\u3000wide", "",
    "zero\u200bwidth", "emoji 🙂!", "a", "  ", "UPPER lower 12,345.67",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> Babel:
    return Babel(BabelSettings(languages=3, train_sentences=300, valid_sentences=40, test_sentences=10))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("normalization", "bytes_"), [("nmt_nfkc", True), ("nmt_nfkc", False), ("identity", True)])
def test_the_same_ids(corpus: Babel, cache: Path, tmp_path: Path, normalization: str, bytes_: bool) -> None:
    ours = train_tokenizer(
        corpus, vocab_size=SIZE, cache_dir=cache, normalization=normalization, byte_fallback=bytes_
    )  # fmt: skip
    write_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [line for language in corpus.languages for line in corpus.monolingual(language, "valid")]
    odd = [text for text in ODD if normalization != "identity" or (text.isascii() and "\t" not in text)]
    for text in [*texts, *odd]:
        ids = ours.encode(text)
        assert theirs(text).input_ids == [*ids, ours.eos_id], repr(text)
        if ours.unk_id not in ids:
            assert theirs.decode(ids).strip() == ours.decode(ids), repr(text)
    assert len(theirs) == ours.vocab_size
    marks = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.mask_token_id)
    assert marks == (0, 1, 2, 3, 4)
    batch = theirs([texts[0], texts[0] + " " + texts[1]], padding=True)
    assert batch.input_ids[0][-1] == ours.pad_id, "padding is on the right, as our positions count"


def test_a_mark_in_the_text_is_the_mark(corpus: Babel, cache: Path, tmp_path: Path) -> None:
    ours = train_tokenizer(corpus, vocab_size=SIZE, cache_dir=cache)
    write_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    language = corpus.languages[1]
    text = corpus.monolingual(language, "valid")[0]
    wanted = [ours.tag_id(language), *ours.encode(text), ours.eos_id]
    assert theirs(f"<2{language}> {text}").input_ids == wanted
    assert theirs(f"<2{language}>{text}").input_ids == wanted


def test_beside_a_model_and_back(corpus: Babel, cache: Path, tmp_path: Path) -> None:
    ours = train_tokenizer(corpus, vocab_size=SIZE, cache_dir=cache)
    model = shake(EncoderDecoder(SIZE, 16, 2, 1, 1, 16, norm=RMSNorm))
    folder = export_model(model, tmp_path / "model", tokenizer=ours)
    again = read_tokenizer(folder)
    assert again.fingerprint == ours.fingerprint
    assert again.languages == corpus.languages
    with pytest.raises(UserError, match="must have the model's vocabulary of 24: it has 480"):
        export_model(EncoderDecoder(24, 16, 2, 1, 1, 16, norm=RMSNorm), tmp_path / "other", tokenizer=ours)
    with pytest.raises(UserError, match=r"the special ids are its own.*Leave tokens out"):
        export_model(model, tmp_path / "other", tokenizer=ours, tokens=SpecialTokens(eos=5))
    with pytest.raises(UserError, match=r"must hold tokenizer\.model"):
        read_tokenizer(export_model(model, tmp_path / "bare"))
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="must be a SentencePiece model"):
        read_tokenizer(folder)


def test_merges_are_not_kept_by_sentencepiece(corpus: Babel, cache: Path, tmp_path: Path) -> None:
    ours: Tokenizer = train_tokenizer(corpus, vocab_size=SIZE, cache_dir=cache, model="bpe")
    model = EncoderDecoder(SIZE, 16, 2, 1, 1, 16, norm=RMSNorm)
    with pytest.raises(UserError, match=r"kind unigram.*Export the model without it"):
        export_model(model, tmp_path / "model", tokenizer=ours)
    assert list(tmp_path.iterdir()) == []
