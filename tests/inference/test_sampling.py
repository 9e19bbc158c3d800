"""Sampling: frequencies against the distribution, cuts against their definitions, seeds."""

from __future__ import annotations

import math

import pytest
import torch
from test_beam_search import EOS, WORDS, Table, every_text

from moekit.inference import Sampling, complete
from moekit.inference.sampling import _uniform, one_seed

PROMPT = torch.ones(1, 1, dtype=torch.int64)


def test_frequencies_of_tokens_follow_the_softmax() -> None:
    draws = 40_000
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -torch.inf, -3.0], dtype=torch.float64)
    for temperature in (0.5, 1.0, 2.0):
        uniform = _uniform(7, torch.arange(draws), 0)
        chosen = Sampling(temperature=temperature).pick(logits.expand(draws, -1), uniform)
        share = chosen.bincount(minlength=7) / draws
        expected = (logits / temperature).softmax(-1)
        # Six standard deviations of a binomial share: chance failure below 1e-7, and the seed is fixed anyway.
        bound = 6 * (expected * (1 - expected) / draws).sqrt()
        assert ((share - expected).abs() <= bound).all()


def test_frequencies_of_whole_texts_follow_the_model() -> None:
    """Through the whole machine: every text of a small model is written as often as the model says."""
    model, draws = Table(4), 20_000
    found = complete(model, PROMPT, search=Sampling(samples=draws, seed=11), max_new_tokens=3, use_cache=False)
    texts = [tuple(text) for text in found.lists()[0]]
    assert len(texts) == draws
    for text in every_text(3):
        expected = math.exp(model.log_prob(text))
        assert abs(texts.count(text) / draws - expected) <= 6 * math.sqrt(expected * (1 - expected) / draws) + 1e-9
    scores = torch.tensor([model.log_prob(text) for text in texts[:50]], dtype=torch.float64)
    torch.testing.assert_close(found.scores[0, :50], scores)


def test_top_k_and_top_p_keep_exactly_the_tokens_they_should() -> None:
    probs = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)
    rows = probs.log().expand(20_000, -1)
    uniform = _uniform(3, torch.arange(20_000), 5)

    def shares(search: Sampling) -> torch.Tensor:
        return search.pick(rows, uniform).bincount(minlength=5) / 20_000

    for search, kept in (
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.3), [1]),
        (Sampling(top_p=0.5), [1, 3]),
        (Sampling(top_p=0.7), [1, 3, 4]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=3, top_p=0.7), [1, 3]),  # of 0.85 that top_k leaves, 0.65 is more than 0.7
    ):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = probs[kept] / probs[kept].sum()
        share = shares(search)
        assert set(share.nonzero()[:, 0].tolist()) == set(kept), search
        assert (share - expected).abs().max() < 6 * 0.5 / math.sqrt(20_000)


def test_the_least_and_the_largest_draw_are_tokens_of_the_set() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for search in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.99), Sampling(top_p=1.0)):
        assert set(search.pick(logits.expand(2, -1), edge).tolist()) <= {1, 2}


def test_one_seed_one_text_and_another_seed_another() -> None:
    model, prompt = Table(0), PROMPT.expand(8, -1)

    def texts(seed: int | None) -> list[list[list[int]]]:
        search = Sampling(samples=3, seed=seed)
        return complete(model, prompt, search=search, max_new_tokens=6, use_cache=False).lists()

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    first = texts(1)
    assert any(row != first[0] for row in first)  # sentences draw independently
    torch.manual_seed(5)
    a = texts(None)
    b = texts(None)
    torch.manual_seed(5)
    assert texts(None) == a
    assert a != b


def test_draws_do_not_depend_on_who_else_is_still_writing() -> None:
    """A sentence in company writes what it writes alone in the same place."""
    model = Table(3)
    together = complete(model, PROMPT.expand(5, -1), search=Sampling(seed=9), max_new_tokens=8, use_cache=False)
    alone = complete(model, PROMPT, search=Sampling(seed=9), max_new_tokens=8, use_cache=False)
    assert together.lists()[0] == alone.lists()[0]
    assert together.lengths.unique().numel() > 1


def test_draws_do_not_depend_on_the_batches_of_an_input() -> None:
    model, search = Table(1), Sampling(temperature=1.5, samples=3, seed=4)
    whole = complete(model, PROMPT.expand(12, -1), search=search, max_new_tokens=6, use_cache=False).lists()
    assert len({str(texts) for texts in whole}) > 6
    found: list[list[list[int]]] = []
    for numbers in torch.arange(12).split(5):
        prompts, options = PROMPT.expand(len(numbers), -1), {"numbers": numbers, "use_cache": False}
        found += complete(model, prompts, search=search, max_new_tokens=6, **options).lists()  # type: ignore[arg-type]
    assert found == whole
    with pytest.raises(ValueError, match=r"numbers must have shape \[1\] for 1 sequences: got \[2\]"):
        complete(model, PROMPT, numbers=torch.arange(2))


def test_more_samples_begin_with_the_fewer() -> None:
    model, prompts = Table(1), PROMPT.expand(6, -1)

    def texts(samples: int) -> list[list[list[int]]]:
        search = Sampling(temperature=1.5, samples=samples, seed=4)
        return complete(model, prompts, search=search, max_new_tokens=6, use_cache=False).lists()

    assert [row[:2] for row in texts(5)] == texts(2)
    assert len({str(row) for row in texts(5)}) > 3
    # Sentences and samples are not exchangeable either.
    number = torch.arange(40)
    draws = torch.stack([_uniform(3, number, 0, torch.full_like(number, sample)) for sample in range(40)])
    assert draws.unique().numel() == draws.numel()
    assert abs(float(((draws - 0.5) * (draws.t() - 0.5)).triu(1).sum() * 12)) < 6 * math.sqrt(40 * 39 / 2)


def test_a_seed_is_drawn_once_for_an_input() -> None:
    torch.manual_seed(5)
    first, second = one_seed(Sampling(0.7, top_k=3)), one_seed(Sampling(0.7, top_k=3))
    assert isinstance(first, Sampling)
    assert isinstance(second, Sampling)
    assert first.seed is not None
    assert first.seed != second.seed
    assert first == Sampling(0.7, top_k=3, seed=first.seed) == one_seed(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures_draw_their_limits(dtype: torch.dtype) -> None:
    """The coldest leave the most probable token, the hottest make all allowed ones alike."""
    generator = torch.Generator().manual_seed(0)
    logits = 3e4 * torch.randn(2_000, 7, generator=generator, dtype=dtype)
    logits[:, [2, 6]] = -torch.inf
    uniform = _uniform(1, torch.arange(2_000), 0)
    for temperature in (5e-324, 1e-310, 1e-300, 1e-30):
        for search in (Sampling(temperature), Sampling(temperature, top_k=3), Sampling(temperature, top_p=0.9)):
            assert search.pick(logits, uniform).equal(logits.argmax(-1)), search
    shares = Sampling(1.7e308).pick(logits, uniform).bincount(minlength=7) / 2_000
    assert shares[[2, 6]].tolist() == [0, 0]
    assert (shares[[0, 1, 3, 4, 5]] - 0.2).abs().max() < 6 * math.sqrt(0.16 / 2_000)


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = torch.stack([_uniform(seed, torch.arange(400), step) for seed in range(5) for step in range(50)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert abs(float(draws.mean()) - 0.5) < 6 * math.sqrt(1 / 12 / draws.numel())
    deciles = (draws * 10).long().flatten().bincount(minlength=10) / draws.numel()
    assert (deciles - 0.1).abs().max() < 6 * math.sqrt(0.09 / draws.numel())
    # Seed, row and step are not exchangeable: as many different numbers as triples.
    triples = [(seed, row, step) for seed in range(8) for row in range(8) for step in range(8)]
    assert len({float(_uniform(seed, torch.tensor([row]), step)) for seed, row, step in triples}) == len(triples)
    centred = draws - 0.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs(float((a * b).mean() * 12)) < 6 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0: got inf"),
        ({"temperature": math.nan}, "temperature must be a finite number above 0: got nan"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"samples": 0}, "samples must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_words_of_the_table() -> None:
    assert len(every_text(3)) == sum((WORDS - 3) ** n for n in range(3))
    assert all(text[-1] == EOS for text in every_text(3))
