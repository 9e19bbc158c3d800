"""Recall of facts: what is asked, each task's score beside a plain loop, and what oracles and guessers reach."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moekit.babel import Babel, BabelSettings, Facts
from moekit.data.batch import Sentences
from moekit.data.ragged import Ragged
from moekit.data.tokenizer import Tokenizer, train_tokenizer
from moekit.heads import CausalLMHead, DenoisingHead, MaskedLMHead, SpanCorruptionHead, TranslationHead
from moekit.inference.choices import ChoiceScorer, parted, recall
from moekit.source import DECILES, ChoiceQuestion
from moekit.tasks import SpanCorruption, SpanCorruptionTask
from moekit.transformer import DecoderOnly, EncoderDecoder

D = 16


@pytest.fixture(scope="module")
def corpus() -> Facts:
    sizes = {"train_sentences": 2_000, "valid_sentences": 5, "test_sentences": 5}
    return Facts(languages=2, entities=60, relations=3, values=12, unknowable=20, **sizes)


@pytest.fixture(scope="module")
def tokenizer(corpus: Facts, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(corpus, vocab_size=260, cache_dir=tmp_path_factory.mktemp("cache"), byte_fallback=False)


@pytest.fixture(scope="module")
def questions(corpus: Facts) -> list[ChoiceQuestion]:
    return [question for code in corpus.languages for question in corpus.questions(code, each=1, choices=4)]


@pytest.mark.parametrize(
    ("sentences", "parts"),
    [
        (["a b c", "a d c"], [("a", "b", "c"), ("a", "d", "c")]),
        (["b c", "d c"], [("", "b", "c"), ("", "d", "c")]),
        (["a b", "a d"], [("a", "b", ""), ("a", "d", "")]),
        (["a le b c", "a la d c", "a le e c"], [("a", "le b", "c"), ("a", "la d", "c"), ("a", "le e", "c")]),
        (["a a b", "a b"], [("a", "a b", ""), ("a", "b", "")]),
        (["x", "y"], [("", "x", ""), ("", "y", "")]),
    ],
)
def test_sentences_are_parted_where_they_differ(sentences: list[str], parts: list[tuple[str, str, str]]) -> None:
    assert parted(sentences) == parts


def test_an_oracle_recalls_all_and_a_guesser_what_chance_gives(corpus: Facts) -> None:
    asked = [question for code in corpus.languages for question in corpus.questions(code, each=40, choices=5)]
    oracle = recall(asked, [[float(i == q.answer) for i in range(5)] for q in asked])
    assert [kind["kind"] for kind in oracle] == ["known", "composed", "unknowable"]
    for kind in oracle:
        assert kind["recall"] == 1
        assert set(kind["languages"].values()) == {1}
        assert set(kind["deciles"]) <= {1, None}
    rng = random.Random(0)
    for kind in recall(asked, [[rng.random() for _ in range(5)] for _ in asked]):
        assert kind["recall"] == pytest.approx(0.2, abs=4 * (0.16 / kind["questions"]) ** 0.5)
    # Whoever cannot tell sentences apart has chance exactly, and not all or nothing.
    for kind in recall(asked, [[0.0] * 5 for _ in asked]):
        assert kind["recall"] == pytest.approx(0.2)


def test_a_model_that_prefers_a_value_is_at_chance_of_what_nobody_knows(corpus: Facts) -> None:
    """The true value of unknowable facts is as any other, whatever a model prefers: length, letters, frequency."""
    asked = [q for code in corpus.languages for q in corpus.questions(code, each=100, choices=4) if q.decile is None]
    preferences: list[Callable[[str], float]] = [len, lambda s: -len(s), lambda s: float(sum(map(ord, s)))]
    for prefers in preferences:
        (found,) = recall(asked, [[prefers(sentence) for sentence in q.sentences] for q in asked])
        assert found["recall"] == pytest.approx(0.25, abs=4 * (0.19 / found["questions"]) ** 0.5)


def test_recall_is_counted_by_decile_and_language() -> None:
    def ask(language: str, decile: int) -> ChoiceQuestion:
        return ChoiceQuestion("known", language, ("a", "b"), 1, decile)

    asked = [ask("en", 0), ask("en", 0), ask("de", 0), ask("de", 9)]
    (found,) = recall(asked, [[0, 1], [1, 0], [0, 1], [2, 1]])
    assert found["deciles"] == [pytest.approx(2 / 3), *[None] * (DECILES - 2), 0]
    assert found["languages"] == {"en": 0.5, "de": 0.5}
    assert (found["recall"], found["questions"]) == (0.5, 4)
    with pytest.raises(ValueError, match="a model must give numbers"):
        recall(asked[:1], [[float("nan"), 1.0]])


def models() -> dict[str, tuple[Any, Any]]:
    torch.manual_seed(0)
    decoder, pair = DecoderOnly(260, D, 4, 2, 24), EncoderDecoder(260, D, 4, 2, 2, 24)
    return {
        "causal_lm": (decoder, CausalLMHead()),
        "span_corruption": (pair, SpanCorruptionHead()),
        "denoising": (pair, DenoisingHead()),
        "masked_lm": (pair, MaskedLMHead(D)),
    }


@torch.no_grad()
def one_sentence(
    task: str, model: Any, head: Any, tokenizer: Tokenizer, language: str, parts: tuple[str, ...]
) -> float:
    """The score of one sentence, without batches and padding, token after token."""
    before, gap, after = (tokenizer.encode(part) for part in parts)
    whole, tag, eos = tokenizer.encode(" ".join(filter(None, parts))), tokenizer.tag_id(language), tokenizer.eos_id

    def likely(hidden: torch.Tensor, token: int) -> float:
        return float(model.logits(hidden).double().log_softmax(-1)[token])

    if task == "masked_lm":
        row = torch.tensor([[tag, *before, *[tokenizer.mask_id] * len(gap), *after, eos]])
        hidden = head.transform(model.encode(row, torch.ones_like(row, dtype=torch.bool)).hidden[0])
        return sum(likely(hidden[1 + len(before) + i], token) for i, token in enumerate(gap)) / len(gap)
    mark = {"span_corruption": tokenizer.sentinel_ids[0], "denoising": tokenizer.mask_id}.get(task)
    forced = [mark] if task == "span_corruption" else []
    answer = [*(gap if task == "span_corruption" else whole), eos]
    memory: tuple[Any, ...] = ()
    if task != "causal_lm":
        source = torch.tensor([[tag, *before, mark, *after, eos]])
        source_mask = torch.ones_like(source, dtype=torch.bool)
        memory = (model.encode(source, source_mask).hidden, source_mask)
    score = 0.0
    for i, token in enumerate(answer):
        given = torch.tensor([[tokenizer.bos_id, *forced, *answer[:i]]])
        score += likely(model.decode(given, *memory).hidden[0, -1], token)
    return score


@pytest.mark.parametrize("task", ["causal_lm", "span_corruption", "denoising", "masked_lm"])
def test_each_task_scores_as_a_plain_loop_does(
    task: str, tokenizer: Tokenizer, questions: list[ChoiceQuestion]
) -> None:
    model, head = models()[task]
    model.eval(), head.eval()
    asked = questions[::7]
    scorer = ChoiceScorer(model, torch.nn.ModuleDict({task: head}), tokenizer, batch_tokens=300)
    for question, scores in zip(asked, scorer.score(task, asked), strict=True):
        expected = [
            one_sentence(task, model, head, tokenizer, question.language, parts) for parts in parted(question.sentences)
        ]
        assert scores == pytest.approx(expected, abs=1e-4)
        assert len({round(score, 3) for score in scores}) > 1


@pytest.mark.parametrize("task", ["causal_lm", "span_corruption", "denoising", "masked_lm"])
def test_agreement_is_scored_as_facts_are(task: str, corpus: Facts, tokenizer: Tokenizer) -> None:
    """The form that differs is what is missing where a task scores what is missing."""
    model, head = models()[task]
    model.eval(), head.eval()
    asked = corpus.agreement_questions("avl", each=6)
    assert {question.kind for question in asked} >= {"article"}
    scorer = ChoiceScorer(model, torch.nn.ModuleDict({task: head}), tokenizer, batch_tokens=300)
    scores = scorer.score(task, asked)
    for question, own in zip(asked, scores, strict=True):
        parts = parted(question.sentences)
        assert [len(gap.split()) for _, gap, _ in parts] == [1, 1]
        assert own == pytest.approx(
            [one_sentence(task, model, head, tokenizer, "avl", part) for part in parts], abs=1e-4
        )
    kinds = recall(asked, scores)
    assert [kind["deciles"] for kind in kinds] == [[]] * len(kinds)


@torch.no_grad()
def test_salient_words_are_asked_for_as_they_are_trained(tokenizer: Tokenizer) -> None:
    """The score is the log-probability of the target of a training batch; of what is not salient it is the old one."""
    sizes = {"train_sentences": 2_000, "valid_sentences": 5, "test_sentences": 5}
    profiled = Facts(languages=2, entities=60, relations=7, values=12, unknowable=20, profiles=0.8, **sizes)
    model, head = models()["span_corruption"]
    task = SpanCorruptionTask(SpanCorruption(salient=1.0)).bound(profiled, tokenizer)
    heads = torch.nn.ModuleDict({task.name: head})
    scorer = ChoiceScorer(model.eval(), heads, tokenizer, batch_tokens=300, readers={task.name: task})
    plain = ChoiceScorer(model, heads, tokenizer, batch_tokens=300)
    asked = [q for code in profiled.languages for q in profiled.questions(code, each=2, choices=4)]
    several = links = 0
    for question, scores in zip(asked, scorer.score(task.name, asked), strict=True):
        language = np.array([tokenizer.language_id(question.language)])
        sources, words = set(), 0
        expected = []
        for sentence in question.sentences:
            text = Ragged.of([tokenizer.encode(sentence)])
            assert task.words is not None
            words += int(task.words.find(text, language).number[0])
            rows = Sentences((text,), (text.lengths,), (language, language), np.zeros(1, np.uint64), tokenizer)
            batch = task.collate(rows)
            assert batch.target is not None
            sources.add(tuple(batch.source[0].tolist()))
            memory = model.encode(batch.source, batch.source_mask).hidden, batch.source_mask
            likely = model.logits(model.decode(batch.target[:, :-1], *memory).hidden[0]).double().log_softmax(-1)
            expected.append(float(likely.gather(1, batch.target[0, 1:, None])[1:].sum()))
            several += tokenizer.sentinel_ids[1] in batch.target
        if words and len(sources) == 1:
            assert scores == pytest.approx(expected, abs=1e-4)
        else:
            links += 1
            assert scores == pytest.approx(plain.score(task.name, [question])[0], abs=1e-4)
    assert several > 20, "all values of a profile are cut out at once"
    assert 0 < links < len(asked) / 4


def test_tasks_without_a_likelihood_are_refused(tokenizer: Tokenizer, questions: list[ChoiceQuestion]) -> None:
    model, head = models()["causal_lm"]
    scorer = ChoiceScorer(model, torch.nn.ModuleDict({"causal_lm": head}), tokenizer)
    with pytest.raises(ValueError, match="got replaced_token, which does not"):
        scorer.score("replaced_token", questions[:1])
    with pytest.raises(ValueError, match="translation is asked for words, with a source"):
        scorer.score("translation", questions[:1])
    words = [replace(questions[0], source="a", source_language="avl")]
    with pytest.raises(ValueError, match="causal_lm is asked for facts or agreement, without a source"):
        scorer.score("causal_lm", words)


@pytest.mark.parametrize("sentinel", [False, True])
@torch.no_grad()
def test_translation_scores_targets_as_a_plain_loop_does(sentinel: bool, tmp_path: Path) -> None:
    corpus = Babel(BabelSettings(languages=3, train_sentences=600))
    tokenizer = train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path, byte_fallback=False)
    asked = [q for d in corpus.directions[1:4] for q in corpus.word_questions(d, each=1, choices=3)][::6]
    assert len({(q.source_language, q.language) for q in asked}) > 1
    torch.manual_seed(0)
    model = EncoderDecoder(300, D, 4, 2, 2, 24).eval()
    heads = torch.nn.ModuleDict({"translation": TranslationHead()})
    scorer = ChoiceScorer(model, heads, tokenizer, batch_tokens=300, sentinel=sentinel)
    mark = tokenizer.sentinel_ids[:1] if sentinel else ()
    for question, scores in zip(asked, scorer.score("translation", asked), strict=True):
        ids = [tokenizer.tag_id(question.language), *tokenizer.encode(question.source or ""), *mark, tokenizer.eos_id]
        row = torch.tensor([ids])
        mask = torch.ones_like(row, dtype=torch.bool)
        memory = model.encode(row, mask).hidden
        for sentence, score in zip(question.sentences, scores, strict=True):
            answer, expected = [*tokenizer.encode(sentence), tokenizer.eos_id], 0.0
            for i, token in enumerate(answer):
                given = torch.tensor([[tokenizer.bos_id, *mark, *answer[:i]]])
                hidden = model.decode(given, memory, mask).hidden[0, -1]
                expected += float(model.logits(hidden).double().log_softmax(-1)[token])
            assert score == pytest.approx(expected, abs=1e-4)


def test_words_are_encoded_alike_in_parts_and_in_whole(tokenizer: Tokenizer, questions: list[ChoiceQuestion]) -> None:
    for question in questions:
        for sentence, parts in zip(question.sentences, parted(question.sentences), strict=True):
            assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(sentence)
