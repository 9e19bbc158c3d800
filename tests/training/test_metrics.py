"""Metrics against sacrebleu and against counting by hand, in one process and in two."""

from __future__ import annotations

import json
import math
import pickle
import random
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from moekit.errors import UserError
from moekit.routing import Routing
from moekit.runs.settings import EvaluateConfig
from moekit.tasks.bleu import bleu, tokenizer_of
from moekit.training.metrics import (
    LabelCounts,
    PieceCounts,
    RoutingStatistics,
    TokenPerplexity,
    TranslationScore,
    pieces,
)

TEXT = "the a small old house dog sees eats runs under over river , . ! Straße über été 2,5 (no)"
WORDS = TEXT.split()


def corpus(seed: int, sentences: int) -> tuple[list[str], list[str]]:
    """References, and hypotheses that change some words; one of each is empty."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(sentences)]
    hypotheses = [
        " ".join(rng.choice(WORDS) if rng.random() < 0.2 else word for word in line.split()) for line in references
    ]
    return ["", *hypotheses], [*references[:1], *references]


def routing(experts: list[list[int]], num_experts: int, **kwargs: Any) -> Routing:
    """A routing of tokens with the given choices; `dropped` and `padding` are assignment numbers."""
    token = torch.tensor([t for t, row in enumerate(experts) for _ in row])
    expert = torch.tensor([e for row in experts for e in row])
    position = torch.zeros_like(token)
    position[kwargs.pop("padding", [])] = -1
    kept = position >= 0
    kept[kwargs.pop("dropped", [])] = False
    return Routing(
        token,
        expert,
        torch.ones(len(token)),
        position,
        kept,
        num_tokens=len(experts),
        num_experts=num_experts,
        **kwargs,
    )


def test_pieces_are_counted_by_expert_as_by_hand() -> None:
    """Dropped assignments count, padding does not, and a token with two experts counts for both."""
    rng = random.Random(5)
    counts, by_hand = PieceCounts({"a": 3, "b": 2}, vocab_size=7), [[[0] * 3 for _ in range(7)], [[0] * 2] * 7]
    for _ in range(4):
        tokens = torch.tensor([[rng.randrange(7) for _ in range(5)] for _ in range(2)])
        chosen = [rng.sample(range(3), 2) for _ in range(10)]
        counts.update({"a": routing(chosen, 3, padding=[0, 1], dropped=[7, 8])}, tokens)
        for place, (token, experts) in enumerate(zip(tokens.flatten().tolist(), chosen, strict=True)):
            for expert in experts if place else []:
                by_hand[0][token][expert] += 1
    found = counts.compute()
    assert found["a"].tolist() == by_hand[0]
    assert found["b"].tolist() == by_hand[1]
    total = sum(map(sum, by_hand[0]))
    for expert, liked in enumerate(pieces.typical_pieces(found["a"], number=3, least=4, first=1)):
        lifts = {}
        for piece in range(1, 7):
            together, of_expert = by_hand[0][piece][expert], sum(row[expert] for row in by_hand[0])
            lift = together * total / (sum(by_hand[0][piece]) * of_expert)
            if together >= 4 and lift > 1:
                lifts[piece] = (together, pytest.approx(lift))
        best = sorted(lifts, key=lambda p: (-round(lifts[p][1].expected, 6), -lifts[p][0], p))[:3]
        assert liked == [(piece, *lifts[piece]) for piece in best]
    with pytest.raises(ValueError, match="tokens must be those of the routing: got 3 and 10"):
        counts.update({"a": routing(chosen, 3)}, torch.tensor([1, 2, 3]))


def test_tables_of_pieces_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_CELLS", 20)
    counts = PieceCounts({"a": 4}, vocab_size=100)
    counts.update({"a": routing([[0], [1], [1]], 4)}, torch.tensor([2, 4, 99]))
    assert counts.compute()["a"].tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0], [0] * 4, [0, 1, 0, 0]]


def test_experts_of_nothing_like_nothing() -> None:
    assert pieces.typical_pieces(torch.zeros(5, 2, dtype=torch.int64)) == [[], []]


def test_translation_score_equals_sacrebleu_on_the_whole_corpus() -> None:
    score = TranslationScore(["en-de", "de-en", "en-fr"])
    expected: dict[str, dict[str, float]] = {"bleu": {}, "chrf": {}}
    signatures = {}
    for seed, direction in enumerate(["en-de", "de-en"]):
        hypotheses, references = corpus(seed, 41)
        for start in range(0, 42, 5):  # in uneven batches
            score.update(direction, hypotheses[start : start + 5], references[start : start + 5])
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            expected[name][direction] = metric.corpus_score(hypotheses, [references]).score
            signatures[name] = str(metric.get_signature())
    result = score.compute()
    for name in ("bleu", "chrf"):
        assert result[name]["directions"] == expected[name]  # exactly
        assert result[name]["average"] == sum(expected[name].values()) / 2
        assert result[name]["signature"] == signatures[name]
        assert 20 < result[name]["average"] < 99
    assert "nrefs:1" in signatures["bleu"]
    json.dumps(result)
    values = score.log_values()
    assert values["bleu/en-de"] == expected["bleu"]["en-de"]
    assert set(values) == {f"{m}/{d}" for m in ("bleu", "chrf") for d in ("en-de", "de-en", "average")}
    score.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert score.compute()["bleu"]["average"] is None


def test_translation_score_follows_the_tokenizer() -> None:
    hypothesis, reference = ["abcdefgh x"], ["abcdefgh y"]
    score = TranslationScore(["en-de"], tokenize="char")
    score.update("en-de", hypothesis, reference)
    metric = BLEU(tokenize="char", force=True)
    assert score.compute()["bleu"]["average"] == metric.corpus_score(hypothesis, [reference]).score
    assert "tok:char" in score.compute()["bleu"]["signature"]


# The target, and sacrebleu's tokenizer where no analyser of Japanese and Korean is installed.
TOKENIZERS = {
    "zh": "zh", "zh_TW": "zh", "zho_Hans": "zh", "cmn": "zh", "yue_Hant": "zh", "ja": "char", "jpn_Jpan": "char",
    "ko": "char", "kor_Hang": "char", "th": "char", "tha_Thai": "char", "lo": "char", "km": "char", "mya_Mymr": "char",
    "bo": "char", "dz": "char", "zho_Latn": "13a", "de": "13a", "eng_Latn": "13a", "kmb": "13a", "vi": "13a",
}  # fmt: skip


def test_bleu_splits_words_as_the_language_of_the_target_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.tasks.bleu.find_spec", lambda name: None)
    assert {language: tokenizer_of(language) for language in TOKENIZERS} == TOKENIZERS
    monkeypatch.setattr("moekit.tasks.bleu.find_spec", lambda name: name)
    assert [tokenizer_of(x) for x in ("ja", "ko_KR", "zh")] == ["ja-mecab", "ko-mecab", "zh"]


def test_bleu_of_text_without_spaces_is_not_zero_and_its_signature_says_how_it_was_computed() -> None:
    said = {
        "en-zh": ("我今天和朋友一起去了北京大学。", "我今天和朋友去了北京大学。", "zh"),
        "en-tha_Thai": ("ฉันไปโรงเรียนทุกวัน", "ฉันไปโรงเรียนทุกวันแล้ว", "char"),
        "zh-en": ("the cat sat on the mat .", "the cat sat on a mat .", "13a"),
    }
    score = TranslationScore([*said, "en-ja"])
    for direction, (hypothesis, reference, _) in said.items():
        score.update(direction, [hypothesis], [reference])
    found = score.compute()["bleu"]
    for direction, (hypothesis, reference, tokenizer) in said.items():
        metric = BLEU(tokenize=tokenizer, force=True)
        assert found["directions"][direction] == metric.corpus_score([hypothesis], [[reference]]).score > 35
    plain, thai, chinese = found["signature"].split("; ")
    assert plain == "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" + plain.rpartition(":")[2]
    assert thai == plain.replace("13a", "char") + " (into tha_Thai)"
    assert chinese == plain.replace("13a", "zh") + " (into zh)"


def test_a_bleu_tokenizer_that_is_not_installed_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ko_mecab.MeCab", None)
    bleu.cache_clear()
    with pytest.raises(UserError, match=r"ko-mecab is not installed: pip install 'sacrebleu\[ko\]'"):
        EvaluateConfig(bleu_tokenizer="ko-mecab").check()


def test_translation_score_refuses_bad_input() -> None:
    score = TranslationScore(["en-de"])
    with pytest.raises(ValueError, match=r"must be one of .* got 'de-en'"):
        score.update("de-en", ["a"], ["a"])
    with pytest.raises(ValueError, match="got 2 hypotheses and 1 references for en-de"):
        score.update("en-de", ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="different directions"):
        TranslationScore(["en-de", "en-de"])
    score.update("en-de", [], [])
    assert score.compute()["chrf"]["directions"] == {}


def test_perplexity_does_not_depend_on_batches() -> None:
    metric = TokenPerplexity(["translation", "masked_lm", "unseen"])
    metric.update("translation", torch.tensor(10.0, requires_grad=True), torch.tensor(3))
    metric.update("translation", 1.0, 7)
    metric.update("masked_lm", torch.tensor(5000.0), 2)
    assert metric.compute() == {"translation": pytest.approx(math.exp(1.1)), "masked_lm": math.inf}
    with pytest.raises(ValueError, match="got 'causal_lm'"):
        metric.update("causal_lm", 1.0, 1)


def test_routing_statistics_against_counting_by_hand() -> None:
    metric = RoutingStatistics({"encoder.1": 4, "decoder.1": 2}, ["en", "de"])
    # Three tokens, two choices each. Token 2 is padding; assignment 1 was dropped.
    first = routing(
        [[0, 1], [0, 2], [3, 3]],
        4,
        padding=[4, 5],
        dropped=[1],
        statistics={"entropy": torch.tensor(0.5)},
    )
    second = routing([[0, 1], [0, 1]], 4, statistics={"entropy": torch.tensor(1.5)})
    metric.update({"encoder.1": first}, torch.tensor([0, 1, 1]))
    metric.update({"encoder.1": second}, torch.tensor([1]))  # one id for a sequence of two tokens
    metric.update({"decoder.1": routing([[0], [0]], 2)}, torch.tensor([[0], [1]]))
    encoder, decoder = metric.compute()["layers"]
    assert encoder["name"] == "encoder.1"
    assert encoder["num_experts"] == 4
    assert encoder["assignments"] == 8
    assert encoder["load"] == pytest.approx([4 / 8, 3 / 8, 1 / 8, 0])
    assert encoder["load_by_language"] == {
        "en": pytest.approx([1 / 2, 1 / 2, 0, 0]),
        "de": pytest.approx([3 / 6, 2 / 6, 1 / 6, 0]),
    }
    assert encoder["entropy"] == pytest.approx((0.5 * 4 + 1.5 * 4) / 8)
    assert encoder["drop_rate"] == pytest.approx(1 / 8)
    assert encoder["dead_experts"] == 1
    assert "experts_per_token" not in encoder, "two for every token"
    assert encoder["load_max_ratio"] == pytest.approx(2.0)
    assert encoder["load_cv"] == pytest.approx(math.sqrt(sum((n - 2) ** 2 for n in (4, 3, 1, 0)) / 4) / 2)
    assert encoder["load_entropy"] == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.375, 0.125)) / math.log(4))
    assert decoder["load"] == [1.0, 0.0]
    assert decoder["entropy"] is None
    assert decoder["load_entropy"] == 0
    assert decoder["load_max_ratio"] == 2
    summary = metric.summary()
    assert summary["dead_experts"] == 2
    assert summary["drop_rate"] == pytest.approx(1 / 16)
    assert summary["entropy"] == pytest.approx(1.0)
    assert set(summary["layers"]) == {"encoder.1", "decoder.1"}
    json.dumps([metric.compute(), summary])
    assert metric.log_values()["routing/dead_experts"] == 2


def test_even_load_and_nothing_routed() -> None:
    metric = RoutingStatistics({"a": 4, "b": 4}, fixed=["b"])
    metric.update({"a": routing([[0, 1, 2, 3]] * 5, 4), "b": routing([[0]], 4, padding=[0])})
    even, empty = metric.compute()["layers"]
    assert (even["load_entropy"], even["load_cv"], even["load_max_ratio"], even["dead_experts"]) == (1, 0, 1, 0)
    assert (even["fixed_load"], empty["fixed_load"]) == (False, True)
    assert empty["load"] == [0.0] * 4
    assert (empty["drop_rate"], empty["dead_experts"], empty["load_cv"], empty["entropy"]) == (0, 0, 0, None)
    assert metric.compute()["languages"] == []


def test_experts_per_token_where_it_varies() -> None:
    """Tokens without an assignment do not count."""
    metric = RoutingStatistics({"a": 4})
    metric.update({"a": routing([[0, 1, 2], [3], [0]], 4, padding=[4])})
    metric.update({"a": routing([[1]], 4)})
    assert metric.compute()["layers"][0]["experts_per_token"] == pytest.approx(5 / 3)
    assert metric.log_values()["routing/a/experts_per_token"] == pytest.approx(5 / 3)


def test_entropy_of_a_batch_without_tokens_does_not_spoil_the_sum() -> None:
    metric = RoutingStatistics({"a": 2})
    metric.update({"a": routing([[0]], 2, padding=[0], statistics={"entropy": torch.tensor(math.nan)})})
    metric.update({"a": routing([[1]], 2, statistics={"entropy": torch.tensor(0.25)})})
    assert metric.compute()["layers"][0]["entropy"] == 0.25


def test_routing_statistics_refuses_bad_input() -> None:
    metric = RoutingStatistics({"a": 2}, ["en"])
    with pytest.raises(ValueError, match="got 'b' with 2 experts"):
        metric.update({"b": routing([[0]], 2)}, torch.tensor([0]))
    with pytest.raises(ValueError, match="got 'a' with 3 experts"):
        metric.update({"a": routing([[0]], 3)}, torch.tensor([0]))
    with pytest.raises(ValueError, match="needs `language` ids"):
        metric.update({"a": routing([[0]], 2)})
    with pytest.raises(ValueError, match="got 2 ids for 3 tokens"):
        metric.update({"a": routing([[0], [0], [1]], 2)}, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="at least one layer"):
        RoutingStatistics({})
    with pytest.raises(ValueError, match=r"fixed must name layers of \['a'\]: got \['b'\]"):
        RoutingStatistics({"a": 2}, fixed=["b"])


def _update(metrics: tuple[Any, ...], part: int) -> None:
    """What process `part` sees; the first sees nothing of de-en and less routing."""
    translation, perplexity, statistics, labels = metrics
    hypotheses, references = corpus(7, 30)
    half = slice(0, 9) if part == 0 else slice(9, None)
    translation.update("en-de", hypotheses[half], references[half])
    perplexity.update("translation", 3.0 + part, 4)
    if part:
        translation.update("de-en", *corpus(8, 5))
        perplexity.update("masked_lm", 2.0, 1)
        labels.update("masked_lm", torch.tensor([0, 1, 1, 1, 8]))
    labels.update("translation", torch.tensor([[2, 2, 3], [4, 4, 4]][part]))
    entropy = {"entropy": torch.tensor(0.1 + part)}
    experts = [[0, 1]] if part == 0 else [[1, 2], [0, 2]]
    statistics.update({"a": routing(experts, 3, dropped=[0], statistics=entropy)}, torch.tensor([part]))


def _metrics() -> tuple[Any, ...]:
    return (
        TranslationScore(["en-de", "de-en"]),
        TokenPerplexity(["translation", "masked_lm"]),
        RoutingStatistics({"a": 3}, ["en", "de"]),
        LabelCounts(["translation", "masked_lm", "never"], 9),
    )


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metrics = _metrics()
    _update(metrics, rank)
    result = [metric.compute() for metric in metrics]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path, forkserver: ForkServerContext) -> None:
    processes = [forkserver.Process(target=_process, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    alone = _metrics()
    for part in (0, 1):
        _update(alone, part)
    assert alone[-1].compute() == {"translation": 3 / 6, "masked_lm": 3 / 5}
    expected = json.loads(json.dumps([metric.compute() for metric in alone]))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_metrics_survive_pickle_and_state_dict() -> None:
    metrics = _metrics()
    _update(metrics, 1)
    for metric in metrics:
        copy = pickle.loads(pickle.dumps(metric))
        assert copy.compute() == metric.compute()
