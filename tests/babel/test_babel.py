"""The generated corpus: disjoint splits, sizes, directions, determinism, and settings that are refused."""

import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from counted_calls import calls_of
from meanings_by_hand import row

from moekit.babel import Babel, BabelSettings, hard_settings
from moekit.babel.concepts import MINIMUM_CONCEPTS, concepts
from moekit.babel.meaning import MeaningSampler, split_of
from moekit.errors import UserError
from moekit.source import Direction


def test_held_out_meanings_and_sentences_never_occur_in_training():
    corpus = Babel(BabelSettings(train_sentences=20_000, valid_sentences=400, test_sentences=400, seed=5))
    for code in corpus.languages:
        train = set(corpus.monolingual(code, "train"))
        valid, test = corpus.monolingual(code, "valid"), corpus.monolingual(code, "test")
        assert len(set(valid)) == len(set(test)) == 400
        assert not train & set(valid)
        assert not train & set(test)
        assert not set(valid) & set(test)
    for split in ("train", "valid", "test"):
        rows = np.array(corpus._row_block(split, 0, 0))
        assert (split_of(rows) == split).all()


def test_held_out_text_stays_held_out_under_another_seed_and_size():
    concept = concepts()
    first = MeaningSampler(concept, seed=0).block("test", 0, 300)
    second = MeaningSampler(concept, seed=1).block("train", 7, 5_000)
    assert not set(map(tuple, first.tolist())) & set(map(tuple, second.tolist()))


def test_a_larger_corpus_begins_with_the_smaller_one():
    small = Babel(BabelSettings(train_sentences=100, test_sentences=30))
    large = Babel(BabelSettings(train_sentences=3_000, test_sentences=2_000))
    direction = Direction("avl", "tnd")
    for split in ("train", "test"):
        pairs = small.parallel(direction, split)
        assert list(pairs) == large.parallel(direction, split)[: len(pairs)]
    assert len(set(large.parallel(direction, "test"))) == 2_000


def test_every_pair_of_languages_says_the_same(babel):
    assert len(babel.directions) == 12
    for direction in babel.directions:
        pairs = babel.parallel(direction, "valid")
        assert len(pairs) == 250
        assert pairs[7] == (
            babel.sentence(direction.source, "valid", 7),
            babel.sentence(direction.target, "valid", 7),
        )
    assert babel.parallel(babel.directions[0], "valid")[-1] == babel.parallel(babel.directions[0], "valid")[249]
    with pytest.raises(IndexError):
        babel.parallel(babel.directions[0], "valid")[250]


def test_indexing_is_lazy_and_order_does_not_matter():
    huge = Babel(BabelSettings(train_sentences=10**9))
    pairs = huge.parallel(Direction("avl", "shl"), "train")
    assert len(pairs) == 10**9
    late = pairs[987_654_321]
    assert late == pairs[987_654_321:987_654_322][0]
    assert pairs[5] == Babel().parallel(Direction("avl", "shl"), "train")[5]


def test_same_settings_same_text_in_another_process():
    settings = BabelSettings(languages=3, train_sentences=200, seed=11)
    code = (
        "from moekit.babel import Babel, BabelSettings\n"
        "print(Babel(BabelSettings(languages=3, train_sentences=200, seed=11)).fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == Babel(settings).fingerprint()


def test_fingerprint_tells_settings_apart(babel):
    digests = {babel.fingerprint(), Babel().fingerprint()}
    assert len(digests) == 1
    for change in (
        {"seed": 1},
        {"concepts": 180},
        {"complexity": "rich"},
        {"train_sentences": 29_999},
        {"sizes": {"kmb": 10}},
        {"cognates": 0.5},
        {"pivot": "avl"},
    ):
        digests.add(Babel(dataclasses.replace(babel.settings, **change)).fingerprint())
    assert len(digests) == 8


def test_tiers_bound_the_directions():
    corpus = Babel(BabelSettings(train_sentences=1_000, sizes={"kmb": 50}, monolingual_sentences=70))
    assert len(corpus.parallel(Direction("avl", "kmb"), "train")) == 50
    assert len(corpus.parallel(Direction("kmb", "shl"), "train")) == 50
    assert len(corpus.parallel(Direction("avl", "shl"), "train")) == 1_000
    assert len(corpus.parallel(Direction("avl", "kmb"), "test")) == 250
    alone = corpus.monolingual("kmb", "train")
    assert len(alone) == 70
    assert len(set(alone) & {corpus.sentence("kmb", "train", index) for index in range(1_000)}) < 10
    assert not set(alone) & set(corpus.monolingual("kmb", "test"))


def test_pivot_and_chosen_directions():
    assert [str(d) for d in Babel(BabelSettings(pivot="tnd")).directions] == [
        "avl-tnd",
        "tnd-avl",
        "tnd-kmb",
        "tnd-shl",
        "kmb-tnd",
        "shl-tnd",
    ]
    chosen = Babel(BabelSettings(directions=("kmb-avl",)))
    assert chosen.directions == (Direction("kmb", "avl"),)
    assert chosen.languages == ("avl", "kmb")


def test_hard_setting_is_harder():
    corpus = Babel(hard_settings(train_sentences=1_000))
    assert len(corpus.languages) == 8
    lengths = [len(sentence.split()) for sentence in corpus.monolingual("avl", "train")[:500]]
    assert sum(lengths) / len(lengths) > 1.3 * 7
    assert len(corpus.parallel(Direction("avl", "ori"), "train")) == 1_000
    assert len(Babel(hard_settings()).parallel(Direction("avl", "ori"), "train")) == 2_000


def test_held_out_text_ends_and_training_does_not(babel):
    assert babel.sentence("avl", "train", 10**6)
    for index in (250, 5_000):
        with pytest.raises(IndexError):
            babel.sentence("avl", "test", index)


def test_pickled_corpus_says_the_same(babel):
    copy = pickle.loads(pickle.dumps(babel))
    assert copy.sentence("shl", "test", 3) == babel.sentence("shl", "test", 3)


def test_a_pair_of_sentences_takes_few_calls():
    """41 of them, a third of a second for twenty thousand pairs: meanings are drawn and sorted in arrays."""

    def generate(sentences: int) -> int:
        corpus = Babel(BabelSettings(train_sentences=sentences))
        pairs: list[object] = []
        calls = calls_of(lambda: pairs.extend(corpus.parallel(Direction("avl", "kmb"), "train")))
        assert len(pairs) == sentences
        return calls

    assert generate(20_000) - generate(10_000) < 60 * 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": 1}, "languages must be at least 2: got 1"),
        ({"concepts": 10}, r"concepts must be at least \d+: got 10"),
        ({"complexity": "hard"}, "complexity must be plain or rich: got 'hard'"),
        ({"train_sentences": -1}, "train_sentences must not be negative"),
        ({"sizes": {"kmb": -1}}, r"sizes\.kmb must not be negative"),
        ({"sizes": {"kbm": 5}}, r"sizes must name languages of the corpus: got 'kbm'\. Did you mean 'kmb'\?"),
        ({"cognates": 2.0}, "cognates must be a share"),
        ({"pivot": "tdn"}, r"pivot must be a language of the data: got 'tdn'\. Did you mean 'tnd'\?"),
        ({"directions": ("avl-tdn",)}, r"got avl-tdn\. Did you mean 'avl-tnd'\?"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Babel(BabelSettings(**settings))


def test_more_held_out_sentences_than_meanings():
    tiny = Babel(BabelSettings(languages=2, concepts=MINIMUM_CONCEPTS, test_sentences=10**7))
    sampler = tiny._sampler
    sampler.draw = lambda generator, size: np.tile(np.array(row(VERB=1, SUBJECT=1, ADVERB=1)), (size, 1))
    with pytest.raises(UserError, match=r"fewer than the different meanings.*Ask for fewer sentences"):
        tiny.sentence("avl", "test", 0)


def test_wrong_names(babel):
    with pytest.raises(UserError, match=r"got 'avi'\. Did you mean 'avl'\?"):
        babel.monolingual("avi", "train")
    with pytest.raises(UserError, match="got 'xx'"):
        babel.parallel(Direction("avl", "xx"), "train")
    with pytest.raises(UserError, match="split must be one of train, valid, test: got 'dev'"):
        babel.parallel(babel.directions[0], "dev")
