"""Scores of continuations beside a loop of one full forward pass for every token; answers; the command ``score``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moekit import MoELayer, routers
from moekit.cli.recipes import main
from moekit.data.sources import open_source
from moekit.data.tokenizer import Tokenizer
from moekit.experts import GroupedMLP
from moekit.inference import ContinuationScores, Question, Scorer, accuracy, few_shot, score_continuations
from moekit.recipes import moe_lm
from moekit.recurrent import RecurrentLM
from moekit.transformer import MLP, DecoderOnly, EncoderDecoder, SinusoidalPositions, every_other

V, D = 40, 16


def sparse(layer: int, side: str) -> MoELayer:
    return MoELayer(routers.switch(D, 4, capacity_factor=None), GroupedMLP(4, D, 24))


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"feed_forward": every_other(sparse), "dropout": 0.5}
    return {
        "decoder": DecoderOnly(V, D, 4, 2, 24, **options),
        "decoder, sinusoids": DecoderOnly(V, D, 4, 2, 24, positions=SinusoidalPositions(), **options),
        "encoder-decoder": EncoderDecoder(V, D, 4, 2, 2, 24, **options),
        "recurrent": RecurrentLM(V, D, MLP(D, 24)),
    }


CONTEXTS = [[1, 5, 6], [1], [1, 9, 9, 9, 9, 9, 30], [1, 5, 6], [1, 8], [1, 5, 6]]
CONTINUATIONS = [[7, 8], [4], [12, 2], [33], [5, 5, 5, 5, 5, 5, 5, 5, 5], [7, 8, 2]]


@torch.no_grad()
def one_at_a_time(model: Any, context: list[int], continuation: list[int], forced: tuple[int, ...] = ()) -> Tensor:
    """A forward over the whole prefix for every token, nothing batched, nothing padded."""
    scores = []
    for n, token in enumerate(continuation):
        if hasattr(model, "encode"):
            memory = model.encode(torch.tensor([context])).hidden
            hidden = model.decode(torch.tensor([[1, *forced, *continuation[:n]]]), memory).hidden
        else:
            hidden = model.decode(torch.tensor([[*context, *continuation[:n]]])).hidden
        logits = model.logits(hidden[0, -1]).double().tolist()
        top = max(logits)
        scores.append(logits[token] - top - math.log(sum(math.exp(x - top) for x in logits)))
    return torch.tensor(scores)


@pytest.mark.parametrize("batch_tokens", [1, 25, 4096])
@pytest.mark.parametrize("name", models())
def test_batches_score_as_a_loop_over_single_tokens(name: str, batch_tokens: int) -> None:
    model = models()[name].train()
    done: list[int] = []
    found = score_continuations(model, CONTEXTS, CONTINUATIONS, batch_tokens=batch_tokens, advance=done.append)
    assert model.training, "its mode is given back"
    model.eval()
    assert sum(done) == len(CONTEXTS)
    assert len(done) == {1: 6, 25: len(done), 4096: 1}[batch_tokens]
    for scores, context, continuation in zip(found, CONTEXTS, CONTINUATIONS, strict=True):
        torch.testing.assert_close(scores, one_at_a_time(model, context, continuation), rtol=1e-4, atol=1e-5)


def test_probabilities_of_all_continuations_sum_to_one() -> None:
    model = models()["decoder"]
    pairs = [[a, b] for a in range(V) for b in range(V)]
    found = score_continuations(model, [[1, 5]] * len(pairs), pairs)
    assert float(torch.stack(found).sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_scored_is_refused() -> None:
    model = models()["decoder"]
    with pytest.raises(ValueError, match="its context: got 1 and 2"):
        score_continuations(model, [[1]], [[3], [4]])
    with pytest.raises(ValueError, match="a continuation needs at least one token: number 1 has none"):
        score_continuations(model, [[1], [1]], [[3], []])
    with pytest.raises(ValueError, match="a context needs at least one token: number 0"):
        score_continuations(model, [[]], [[3]])
    assert score_continuations(model, [], []) == []
    with pytest.raises(ValueError, match="none may be empty"):
        Question("a", ("b", " "))
    with pytest.raises(ValueError, match=r"0\.\.1: got 2"):
        Question("a", ("b", "c"), 2)


def test_rows_may_be_tensors_and_arrays() -> None:
    model = models()["decoder"].eval()
    wanted = score_continuations(model, CONTEXTS, CONTINUATIONS)
    for make in (torch.tensor, np.array):
        found = score_continuations(model, [*map(make, CONTEXTS)], [*map(make, CONTINUATIONS)])
        assert all(map(torch.equal, found, wanted))


def test_scores_that_are_no_numbers_answer_nothing() -> None:
    scores = ContinuationScores((-1.0, math.nan), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="must give numbers: it scores the continuations"):
        scores.best()
    with pytest.raises(ValueError, match="one of sum, token, character: got 'oops'"):
        scores.normalised("oops")  # type: ignore[arg-type]


def test_three_ways_to_compare() -> None:
    scores = ContinuationScores(log_probs=(-4.0, -6.0, -6.0), tokens=(2, 4, 2), characters=(4, 5, 20))
    assert scores.normalised("sum") == (-4, -6, -6)
    assert scores.normalised("token") == (-2, -1.5, -3)
    assert scores.normalised("character") == (-1, -1.2, -0.3)
    assert [scores.best(by) for by in ("sum", "token", "character")] == [0, 1, 2]
    questions = [Question("a", ("b", "c", "d"), answer) for answer in (0, 1, None)]
    assert accuracy(questions, [scores] * 3) == 0.5
    assert accuracy(questions[:1], [scores], "token") == 0
    assert math.isnan(accuracy(questions[2:], [scores]))


def test_examples_come_before_the_question() -> None:
    examples = [Question("One and one is", ("two", "three"), 0), Question("Two and two is", ("five", "four"), 1)]
    asked = few_shot(Question("One and two is", ("three", "nine"), 0), examples)
    assert asked.context == "One and one is two\n\nTwo and two is four\n\nOne and two is"
    assert (asked.continuations, asked.answer) == (("three", "nine"), 0)
    assert few_shot(asked, []) == asked
    with pytest.raises(ValueError, match="needs an answer: 'Why' has none"):
        few_shot(asked, [Question("Why", ("because",))])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, list[str]]:
    from moekit.data.module import MultitaskData, TaskData

    source = open_source("babel", None, languages=2, train_sentences=300)
    data = MultitaskData(
        source, tasks={"causal_lm": TaskData()}, cache=tmp_path_factory.mktemp("cache"), vocab_size=400
    )
    return data.tokenizer, list(data.source.monolingual(data.languages[0], "test")[:6])


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_text_is_framed_as_in_training(kind: str, tokenizer: tuple[Tokenizer, list[str]]) -> None:
    words, texts = tokenizer
    torch.manual_seed(0)
    size = words.vocab_size
    model: Any = (
        DecoderOnly(size, D, 4, 1, 24) if kind == "decoder" else EncoderDecoder(size, D, 4, 1, 1, 24)
    ).eval()  # fmt: skip
    questions = [Question(texts[0], (texts[1], texts[2]), 0), Question("", (texts[3], texts[4], texts[5]))]
    one, two = words.languages[:2]
    found = Scorer(model, words, batch_tokens=64).score(questions, one, two)
    mark = words.sentinel_ids[0]
    (marked,) = Scorer(model, words, sentinel=True).score(questions[:1], one, two)
    if kind != "decoder":
        source = [words.tag_id(two), *words.encode(texts[0]), mark, words.eos_id]
        expected = one_at_a_time(model, source, [*words.encode(texts[1]), words.eos_id], (mark,))
        assert marked.log_probs[0] == pytest.approx(float(expected.sum()), rel=1e-4)
    for question, scores in zip(questions, found, strict=True):
        assert scores.characters == tuple(len(text) for text in question.continuations)
        for text, total, count in zip(question.continuations, scores.log_probs, scores.tokens, strict=True):
            context, continuation = [1, *words.encode(question.context)], words.encode(text)
            if kind != "decoder":
                context = [words.tag_id(two), *words.encode(question.context), words.eos_id]
                continuation = [*continuation, words.eos_id]
            expected = one_at_a_time(model, context, continuation)
            assert count == len(expected)
            assert total == pytest.approx(float(expected.sum()), rel=1e-4)


OPTIONS = [
    "--data.babel_languages", "2", "--data.babel_sentences", "300", "--data.vocab_size", "400",
    "--data.max_length", "32", "--tasks.causal_lm.tokens", "128", "--train.max_steps", "2",
    "--train.warmup_steps", "1", "--train.log_every", "1", "--train.validate_every", "0", "--train.accelerator", "cpu",
    "--evaluate.max_sentences", "2", "--evaluate.valid_sentences", "4", "--evaluate.samples", "0",
    "--model.dim", "16", "--model.heads", "2", "--model.hidden_dim", "8", "--model.num_experts", "4",
]  # fmt: skip


def test_the_command_answers_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
    assert main(moe_lm.RECIPE, ["fit", *OPTIONS, "--data.cache", cache, "--out", run]) == 0
    asked, shown, out = tmp_path / "asked", tmp_path / "shown", tmp_path / "out"
    lines = [
        {"context": "ba to", "continuations": ["na", "ri ba to na"], "answer": 1},
        {"context": "", "continuations": ["x", "to", "ba"], "answer": 0},
        {"context": "to", "continuations": ["ri"]},
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    shown.write_text(json.dumps(lines[0]) + "\n")
    given = ["score", "--out", run, "--from", "avl", "--input", str(asked)]

    def scored(*more: str) -> list[Any]:
        assert main(moe_lm.RECIPE, [*given, "--output", str(out), *more]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    capsys.readouterr()
    zero = scored()
    told = capsys.readouterr().err
    assert len(zero) == 3
    right = sum(zero[i]["best"]["token"] == lines[i]["answer"] for i in (0, 1)) / 2
    assert "accuracy of 2 answers, 0 examples shown" in told
    assert f"{right:.4f} by token" in told
    for found, line in zip(zero, lines, strict=True):
        assert len(found["scores"]["sum"]) == len(line["continuations"])  # type: ignore[arg-type]
    few = scored("--examples", str(shown))
    assert few[0]["scores"] != zero[0]["scores"]
    for wrong, message in (
        ("{", "line 1, column 2: the line must be JSON"),
        ('{"context": "a", "continuations": "b"}', "line 1 must be {"),
        ('{"context": "a", "continuations": ["b"], "answer": true}', "line 1 must be {"),
        ('{"context": "a", "continuations": ["b"], "answer": 4}', "0..0: got 4"),
        ('{"context": "a", "continuations": []}', "needs continuations"),
    ):
        asked.write_text(wrong)
        assert main(moe_lm.RECIPE, given) == 2
        assert message in capsys.readouterr().err
    shown.write_text(json.dumps(lines[2]))
    assert main(moe_lm.RECIPE, [*given, "--examples", str(shown)]) == 2
    assert "--examples" in capsys.readouterr().err
    assert main(moe_lm.RECIPE, ["score", "--out", run, "--input", str(asked)]) == 2
    assert "score needs --from: one of avl" in capsys.readouterr().err
