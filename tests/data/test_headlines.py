"""Headlines: each can be told from its paragraph, by rule and in any language; and what fine-tuning asks of data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import TinySource

from moekit.babel.meaning import Meaning
from moekit.data.batch import Batch
from moekit.data.module import MultitaskData, TaskData
from moekit.data.ragged import Ragged
from moekit.data.sources import Babel, BabelSettings, Headlines, open_source
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.inference.translator import Translator
from moekit.source import Direction
from moekit.transformer import EncoderDecoder


@pytest.fixture(scope="module")
def source() -> Headlines:
    return Headlines(Babel(BabelSettings(languages=3, seed=4)), train_documents=600)


def core(meaning: Meaning) -> tuple[Any, ...]:
    """Who did what to whom: verb, tense, polarity, participants as plain or plural nouns."""
    people = (meaning.subject, meaning.object, meaning.recipient)
    return meaning.verb, meaning.tense, meaning.negative, *((p.noun, p.plural) if p else None for p in people)


def test_the_headline_is_what_the_protagonist_does_first(source: Headlines) -> None:
    """Exactly one figure is the subject of two sentences, and the headline is the core of its first."""
    places = []
    for split, index in itertools.product(("train", "valid", "test"), range(0, 250, 5)):
        document, headline = source.meanings(split, index)  # type: ignore[arg-type]
        figures = [sentence.subject.noun for sentence in document]
        assert len(document) == 4
        assert sorted(map(figures.count, set(figures))) == [1, 1, 2]
        protagonist = next(noun for noun in figures if figures.count(noun) == 2)
        lead = document[figures.index(protagonist)]
        assert core(headline) == core(lead)
        assert headline.place is headline.adverb is None
        for phrase in (headline.subject, headline.object, headline.recipient):
            assert phrase is None or not (phrase.adjectives or phrase.numeral or phrase.demonstrative)
        places.append(figures.index(protagonist))
    # To copy the first sentence is right half of the time, and no more.
    assert 0.35 < places.count(0) / len(places) < 0.65


def test_text_says_the_meanings_in_each_language(source: Headlines) -> None:
    say = {code: source.corpus.language(code) for code in source.languages}
    for code in source.languages:
        paragraph, headline = source.text(code, "test", 7)
        sentences = paragraph.split(". ")
        assert len(sentences) == 4
        assert paragraph.endswith(".")
        assert headline.endswith(".")
        assert len(headline) < len(paragraph)
        known = {word for forms in (say[code].forms.adverb, say[code].forms.adposition) for word in forms}
        assert not set(headline.removesuffix(".").split()) & known


def test_directions_pair_languages(source: Headlines) -> None:
    one = Direction("avl", "avl")
    assert source.directions == tuple(Direction(code, code) for code in source.languages)
    assert len(source.parallel(one, "train")) == 600
    across = Headlines(source.corpus, train_documents=600, directions=["avl-tnd", "tnd-avl"])
    assert across.languages == ("avl", "tnd")
    forth = across.parallel(Direction("avl", "tnd"), "train")
    back = across.parallel(Direction("tnd", "avl"), "train")
    same = source.parallel(one, "train")
    assert forth[300][0] == same[300][0]
    assert back[300][1] == same[300][1]
    assert forth[3:6] == [forth[3], forth[4], forth[5]]
    assert set(source.monolingual("avl", "test")) == {text for pair in source.parallel(one, "test") for text in pair}


def test_nothing_of_a_test_paragraph_is_in_training(source: Headlines) -> None:
    def sentences(split: str, count: int) -> set[str]:
        documents = [source.meanings(split, i)[0] for i in range(count)]  # type: ignore[arg-type]
        return {str(sentence) for document in documents for sentence in document}

    assert not sentences("train", 600) & sentences("test", 250)


def test_the_same_settings_give_the_same_text(source: Headlines) -> None:
    again = Headlines(Babel(BabelSettings(languages=3, seed=4)), train_documents=600)
    assert again.text("kmb", "train", 599) == source.text("kmb", "train", 599)
    assert again.fingerprint() == source.fingerprint()
    for changes in ({"sentences": 5}, {"train_documents": 601}, {"directions": ["avl-tnd"]}):
        assert Headlines(source.corpus, **({"train_documents": 600} | changes)).fingerprint() != source.fingerprint()  # type: ignore[arg-type]
    other = open_source("headlines", languages=3, seed=5, train_documents=600)
    assert other.fingerprint() != source.fingerprint()
    assert isinstance(other, Headlines)
    assert other.corpus.settings.seed == 5


def test_bad_settings_are_refused(source: Headlines) -> None:
    corpus = source.corpus
    with pytest.raises(UserError, match=r"must be of the languages: got avl-xx\. Did you mean 'avl"):
        Headlines(corpus, directions=["avl-xx"])
    with pytest.raises(UserError, match="at least one direction"):
        Headlines(corpus, directions=[])
    with pytest.raises(UserError, match="3 sentences or more: got 2"):
        Headlines(corpus, sentences=2)
    with pytest.raises(UserError, match="must not be negative"):
        Headlines(corpus, train_documents=-1)
    with pytest.raises(UserError, match="has no path"):
        open_source("headlines", "folder")
    with pytest.raises(UserError, match="settings must be known ones: got 'sentence'"):
        open_source("headlines", sentence=3)
    crowd = Headlines(Babel(BabelSettings(languages=2, concepts=60)), sentences=60)
    with pytest.raises(UserError, match="the concepts have fewer"):
        crowd.text("avl", "train", 0)


# -- a tokenizer from elsewhere, and sentinels ---------------------------------------------------------------------


def data(cache: Path, **options: Any) -> MultitaskData:
    settings: dict[str, Any] = {"vocab_size": 400, "tokens_per_step": 600, "progress": False} | options
    return MultitaskData(settings.pop("source", TinySource()), cache=cache, **settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return data(tmp_path_factory.mktemp("cache")).tokenizer


def test_a_given_tokenizer_is_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """For some of its languages, by their own ids; nothing is trained."""
    made = data(tmp_path, source=TinySource(("cc", "aa"), seed=9), tokenizer=tokenizer, vocab_size=7)
    assert made.tokenizer is tokenizer
    batch = next(iter(made.train_dataloader()))["translation"]
    assert set(batch.source_language.tolist()) == {0, 2}
    assert torch.equal(batch.source[:, 0], tokenizer.first_tag_id + batch.target_language)
    assert not (tmp_path / "tokenizers").exists()
    stranger = data(tmp_path, tokenizer=data(tmp_path, source=TinySource(("aa", "bb"))).tokenizer)
    with pytest.raises(UserError, match="must know the language 'cc'"):
        stranger.train_dataloader()


def test_ragged_grows_at_its_ends() -> None:
    text = Ragged.of([[7, 8], [], [9]])
    assert [row.tolist() for row in text.append(5)] == [[7, 8, 5], [5], [9, 5]]
    assert [row.tolist() for row in text.prepend(5)] == [[5, 7, 8], [5], [5, 9]]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_sentinel_ends_the_source_and_begins_the_target(tokenizer: Tokenizer, tmp_path: Path, split: str) -> None:
    """The same sentences, each side one longer; within the budget."""
    first = tokenizer.sentinel_ids[0]
    found: list[list[tuple[list[int], list[int]]]] = []
    for sentinel in (False, True):
        made = data(tmp_path, tokenizer=tokenizer, tasks={"translation": TaskData(sentinel=sentinel)})
        if split == "train":
            batches: list[Batch] = [next(iter(made.train_dataloader()))["translation"]]
            assert batches[0].num_positions <= 600
        else:
            batches = list(made.val_dataloader())
        rows = [
            (source[mask].tolist(), target[other].tolist())
            for b in batches
            for source, mask, target, other in zip(b.source, b.source_mask, b.target, b.target_mask, strict=True)  # type: ignore[arg-type]
        ]
        found.append(rows)
    for source, target in found[1]:
        assert source[-2:] == [first, tokenizer.eos_id]
        assert target[:2] == [tokenizer.bos_id, first]
    stripped = [([*source[:-2], source[-1]], [target[0], *target[2:]]) for source, target in found[1]]
    if split == "valid":
        assert sorted(stripped) == sorted(found[0])
    assert all(first not in source for source, _ in stripped)


def test_a_translator_with_sentinels(tokenizer: Tokenizer) -> None:
    """The model reads and begins with the sentinel, and nobody sees it in the text."""
    torch.manual_seed(0)
    model = EncoderDecoder(tokenizer.vocab_size, 8, 2, 1, 1, 16)
    seen: list[list[int]] = []
    encode, decode = model.encode, model.decode
    model.encode = lambda ids, *rest: seen.append(ids[0].tolist()) or encode(ids, *rest)  # type: ignore[assignment, func-returns-value]
    model.decode = lambda ids, *rest, **more: seen.append(ids[0].tolist()) or decode(ids, *rest, **more)  # type: ignore[assignment, func-returns-value]
    text = Translator(model, tokenizer, sentinel=True).translate(["bada gobe"], "aa", "bb")
    first = tokenizer.sentinel_ids[0]
    assert seen[0][-2:] == [first, tokenizer.eos_id]
    assert seen[1][:2] == [tokenizer.bos_id, first]
    assert "extra" not in text[0]
