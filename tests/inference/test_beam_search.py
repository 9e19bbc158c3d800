"""Beam search on models small enough to enumerate, and length penalties against their formulas."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moekit.inference import BeamSearch, GNMTPenalty, Greedy, MeanLogProb, Sampling, complete
from moekit.inference.length_penalty import best_possible

EOS, WORDS = 2, 6  # ids 3, 4, 5 are words; 0, 1 are padding and begin


@dataclass
class _Output:
    hidden: Tensor


class Table:
    """A model of order n - 1: log-probabilities looked up by the last tokens. It satisfies CausalModel."""

    def __init__(self, seed: int, order: int = 3, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(*[WORDS] * order, generator=generator, dtype=torch.float64)
        logits[..., :2] = -torch.inf  # neither padding nor begin
        self.table, self.order = logits.to(dtype), order
        self.rows_seen: list[int] = []

    def decode(self, ids: Tensor, mask: object, language: object, cache: object) -> _Output:
        self.rows_seen.append(ids.shape[0])
        return _Output(ids[:, None, :])

    def logits(self, hidden: Tensor) -> Tensor:
        context = torch.cat((hidden.new_ones(hidden.shape[0], self.order), hidden), dim=1)[:, -(self.order - 1) :]
        return self.table[tuple(context.unbind(1))]

    def new_cache(self) -> None:
        return None

    def log_prob(self, text: tuple[int, ...]) -> float:
        total, context = 0.0, [1] * self.order
        for token in text:
            total += float(self.table[tuple(context[-(self.order - 1) :])].log_softmax(-1)[token])
            context.append(token)
        return total


def every_text(limit: int) -> list[tuple[int, ...]]:
    """All texts that end within `limit` tokens."""
    words = range(3, WORDS)
    return [(*text, EOS) for length in range(limit) for text in itertools.product(words, repeat=length)]


def slow_score(penalty: object, total: float, length: int) -> float:
    if isinstance(penalty, GNMTPenalty):
        return total / ((5 + length) ** penalty.alpha / (5 + 1) ** penalty.alpha)
    assert isinstance(penalty, MeanLogProb)
    return total / length**penalty.alpha


PENALTIES = [
    GNMTPenalty(0.0),
    GNMTPenalty(0.6),
    GNMTPenalty(1.0),
    GNMTPenalty(3.0),
    MeanLogProb(),
    MeanLogProb(2.0),
    MeanLogProb(-0.5),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_best_texts_there_are(seed: int, penalty: object) -> None:
    limit, model = 4, Table(seed)
    texts = [*every_text(limit), *itertools.product(range(3, WORDS), repeat=limit)]  # the last are cut
    ranked = sorted(texts, key=lambda t: -slow_score(penalty, model.log_prob(t), len(t)))
    prompt = torch.ones(1, 1, dtype=torch.int64)
    search = BeamSearch(4**limit, num_return=5, penalty=penalty, early_stopping="never")
    found = complete(model, prompt, search=search, max_new_tokens=limit, use_cache=False)
    assert found.lists()[0] == [list(text) for text in ranked[:5]]
    assert found.ended[0].tolist() == [text[-1] == EOS for text in ranked[:5]]
    expected = [slow_score(penalty, model.log_prob(t), len(t)) for t in ranked[:5]]
    torch.testing.assert_close(found.scores[0], torch.tensor(expected, dtype=torch.float64))


def slow_beam_search(
    model: Table, size: int, limit: int, penalty: object, early_stopping: object
) -> list[tuple[float, tuple[int, ...]]]:
    """The full beam written out: no batch, no tensors; "never" goes to the limit."""
    live: list[tuple[int, ...]] = [()]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        grown = [(*text, token) for text in live for token in range(2, WORDS)]
        grown = sorted(grown, key=lambda t: -model.log_prob(t))
        over = [t for t in grown[:size] if t[-1] == EOS or length == limit]
        done = sorted(done + [(slow_score(penalty, model.log_prob(t), length), t) for t in over], reverse=True)[:size]
        live = [t for t in grown if t[-1] != EOS][:size]
        if early_stopping != "never" and len(done) == size:
            best = slow_score(penalty, model.log_prob(live[0]), length)
            if early_stopping is True or best <= done[-1][0]:
                break
    return done


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_narrow_beams_against_a_slow_twin(size: int, penalty: object, early_stopping: object) -> None:
    for seed, limit, num_return in itertools.product(range(2), (1, 3, 6), {1, size}):
        model = Table(seed)
        expected = slow_beam_search(model, size, limit, penalty, early_stopping)[:num_return]
        search = BeamSearch(size, num_return=num_return, penalty=penalty, early_stopping=early_stopping)
        prompt = torch.ones(1, 1, dtype=torch.int64)
        found = complete(model, prompt, search=search, max_new_tokens=limit, use_cache=False)
        assert found.lists()[0] == [list(text) for _, text in expected]
        assert found.ended[0, : len(expected)].tolist() == [text[-1] == EOS for _, text in expected]
        scores = torch.tensor([score for score, _ in expected], dtype=torch.float64)
        torch.testing.assert_close(found.scores[0, : len(expected)], scores)


def test_the_beam_stays_full_and_rules_stop_it() -> None:
    model = Table(0)
    model.table[...] = torch.tensor([-torch.inf, -torch.inf, 5.0, 0.0, 0.0, 0.0])  # the end is all but certain
    prompt = torch.ones(3, 1, dtype=torch.int64)

    def rows(**options: object) -> list[int]:
        model.rows_seen.clear()
        complete(model, prompt, search=BeamSearch(2, **options), max_new_tokens=50, use_cache=False)
        return list(model.rows_seen)

    # The first step sets one text aside, the second the next; the beam of two is not narrower for it.
    assert rows(early_stopping=True) == rows() == [3, 6]
    # Nothing live can lead to a better one than the first: one look is enough for the best, two for both.
    assert rows(early_stopping="never") == [3]
    assert rows(early_stopping="never", num_return=2)[:2] == [3, 6]
    model.rows_seen.clear()
    complete(model, prompt, search=Greedy(), max_new_tokens=50, use_cache=False)
    assert model.rows_seen == [3]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_the_later_a_search_stops_the_better_its_best_text(penalty: object) -> None:
    prompt = torch.ones(1, 1, dtype=torch.int64)
    for seed, size in itertools.product(range(3), (2, 4)):
        best = [
            complete(
                Table(seed), prompt, search=BeamSearch(size, penalty=penalty, early_stopping=rule), max_new_tokens=12,
                use_cache=False,
            ).scores[0, 0]
            for rule in ("never", False, True)
        ]  # fmt: skip
        assert best[0] >= best[1] >= best[2]


def test_finished_sentences_leave_the_batch() -> None:
    model = Table(0, order=2)
    model.table[...] = -torch.inf
    model.table[3, EOS] = model.table[4, 3] = model.table[5, 4] = 0.0  # 5 -> 4 -> 3 -> end
    prompt = torch.tensor([[1, 3], [1, 5], [1, 4]])
    for search in (Greedy(), BeamSearch(1), BeamSearch(3), Sampling(seed=0)):
        model.rows_seen.clear()
        found = complete(model, prompt, search=search, max_new_tokens=9, use_cache=False)
        assert found.best() == [[EOS], [4, 3, EOS], [3, EOS]]
        assert model.rows_seen == [3, 2, 1]


def test_ragged_prompts_keep_to_themselves() -> None:
    """Given tokens are neither scored nor counted, whatever their neighbours' lengths."""
    model = Table(5)
    prompt = torch.tensor([[1, 4, 3, 5], [1, 0, 0, 0], [1, 2, 0, 0]])  # the last was given an end token
    mask = prompt > 0
    for search in (BeamSearch(3, num_return=3), BeamSearch(1), Greedy()):
        found = complete(model, prompt, mask, search=search, max_new_tokens=5, use_cache=False)
        for row, length in enumerate((4, 1, 2)):
            alone = complete(model, prompt[row : row + 1, :length], search=search, max_new_tokens=5, use_cache=False)
            assert found.lists()[row] == alone.lists()[0]
            torch.testing.assert_close(found.scores[row], alone.scores[0])


def test_fewer_texts_than_asked_for_leave_empty_places() -> None:
    prompt = torch.ones(1, 1, dtype=torch.int64)
    found = complete(Table(1), prompt, search=BeamSearch(9, num_return=9), max_new_tokens=1, use_cache=False)
    assert found.lengths[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert found.scores[0, 4:].eq(-torch.inf).all()
    assert len(found.lists()[0]) == 4


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_length_penalty_against_its_formula(penalty: object) -> None:
    for length in range(1, 60):
        value = -7.0 / float(penalty.divisor(torch.tensor(length)))
        assert value == pytest.approx(slow_score(penalty, -7.0, length), rel=1e-12)


def test_a_penalty_is_finite() -> None:
    for penalty in (GNMTPenalty, MeanLogProb):
        for alpha in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{penalty.__name__}.alpha must be a finite number: got {alpha}"):
                penalty(alpha)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_the_bound_is_met_and_never_passed(penalty: object) -> None:
    """Over all ways to go on for free, the best score is the bound."""
    for length, limit in ((0, 1), (0, 9), (3, 4), (3, 30), (8, 8)):
        total = torch.tensor([-3.0], dtype=torch.float64)
        bound = best_possible(penalty, total, torch.tensor([length]), torch.tensor([limit]))
        ways = [slow_score(penalty, -3.0, final) for final in range(min(length + 1, limit), limit + 1)]
        assert float(bound) == pytest.approx(max(ways), rel=1e-12)


def test_first_of_equals_for_greedy_and_beam_alike() -> None:
    model = Table(0)
    model.table[...] = torch.tensor([-torch.inf, -torch.inf, -9.0, 0.0, 0.0, 0.0])
    prompt = torch.ones(2, 1, dtype=torch.int64)
    greedy = complete(model, prompt, max_new_tokens=4, use_cache=False)
    assert greedy.best() == [[3, 3, 3, 3]] * 2
    assert complete(model, prompt, search=BeamSearch(1), max_new_tokens=4, use_cache=False).best() == greedy.best()


def test_low_precision_models_are_scored_in_float32() -> None:
    model = Table(2, dtype=torch.bfloat16)
    prompt = torch.ones(1, 1, dtype=torch.int64)
    found = complete(model, prompt, search=BeamSearch(2), max_new_tokens=5, use_cache=False)
    assert found.token_scores.dtype == torch.float32
    text = found.best()[0]
    model.table = model.table.double()
    torch.testing.assert_close(float(found.token_scores.sum()), model.log_prob(tuple(text)), rtol=1e-6, atol=1e-6)
