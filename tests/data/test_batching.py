from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.data.keyed import uniform
from moekit.data.mixture import Constant, LinearHeating, sampling_probabilities
from moekit.data.plan import WINDOW, Sizes, StepPlan, cut, fill
from moekit.errors import UserError

COUNTS = {"en-de": 3000, "de-en": 3000, "en-xx": 40, "xx-en": 7}


def sizes(name: str, count: int, *, two_sided: bool = True) -> Sizes:
    """Lengths as in real text: log-normal, the sides correlated at about 0.75."""
    rng = np.random.default_rng([count, len(name), ord(name[0])])
    common, own = rng.normal(size=count), rng.normal(size=(2, count))
    source, target = (np.clip(np.exp(2.8 + 0.4 * (0.85 * common + 0.5 * o)), 3, 90).astype(np.int64) for o in own)
    return Sizes(name, source, target if two_sided else None)


def plan(**changes: Any) -> StepPlan:
    arguments: dict[str, Any] = {"budget": 3000, "temperature": Constant(5.0), "seed": 0, **changes}
    streams = arguments.pop("streams", None) or [sizes(name, count) for name, count in COUNTS.items()]
    return StepPlan(arguments.pop("name", "translation"), streams, **arguments)


def drawn(made: StepPlan, steps: range) -> list[tuple[int, int]]:
    rows = [made.rows(step) for step in steps]
    return [(int(s), int(i)) for r in rows for s, i in zip(r.stream, r.index, strict=True)]


def positions(made: StepPlan, step: int) -> tuple[int, int]:
    """Padded and real positions of a step."""
    rows = made.rows(step)
    pairs = [
        (int(made.streams[s].source[i]), 0 if made.streams[s].target is None else int(made.streams[s].target[i]))
        for s, i in zip(rows.stream, rows.index, strict=True)
    ]
    return len(pairs) * sum(max(side) for side in zip(*pairs, strict=True)), sum(map(sum, pairs))


def test_any_step_can_be_asked_for_in_any_order() -> None:
    walked, jumped = plan(), plan()
    steps = list(range(0, 3 * WINDOW, 5))
    forward = {step: walked.rows(step) for step in steps}
    for step in [*reversed(steps), 100, 2, 100]:
        rows = jumped.rows(step)
        expected = forward.get(step) or walked.rows(step)
        np.testing.assert_array_equal(rows.stream, expected.stream)
        np.testing.assert_array_equal(rows.index, expected.index)
        np.testing.assert_array_equal(rows.keys, expected.keys)


def test_a_far_step_is_found_without_walking(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(temperature=LinearHeating(1.0, 5.0, 500_000))
    asked: list[int] = []
    draws = made._draws
    monkeypatch.setattr(made, "_draws", lambda window: asked.append(window) or draws(window))
    made.rows(1_000_000)
    assert asked == [1_000_000 // WINDOW]


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "denoising"}])
def test_seed_and_task_change_the_order(change: dict[str, Any]) -> None:
    assert drawn(plan(), range(5)) != drawn(plan(**change), range(5))


def test_every_sentence_comes_once_before_any_comes_again() -> None:
    made = plan(temperature=Constant(2.0))
    seen = Counter(drawn(made, range(8 * WINDOW)))
    for stream, name in enumerate(COUNTS):
        times = [seen[stream, i] for i in range(COUNTS[name])]
        # Inside one window the order is by batch, so at its end the pass is exact: counts differ by one at most.
        assert max(times) - min(times) <= 1, name
        assert max(times) >= 1
    assert max(seen[3, i] for i in range(7)) > 10, "the small stream was passed over many times"


def test_passes_over_a_stream_differ() -> None:
    made = plan(streams=[sizes("en", 100, two_sided=False)], budget=200)
    order = [i for window in range(12) for i in made._draws(window).index.tolist()]
    passes = [order[i : i + 100] for i in range(0, 600, 100)]
    assert all(sorted(one) == list(range(100)) for one in passes)
    assert len({tuple(one) for one in passes}) == 6


@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
def test_streams_are_drawn_as_the_temperature_says(temperature: float) -> None:
    made = plan(temperature=Constant(temperature))
    total = Counter(stream for stream, _ in drawn(made, range(2 * WINDOW)))
    expected = sampling_probabilities(list(COUNTS.values()), np.array([temperature]))[0]
    rows = sum(total.values())
    # Counts are running sums of fractions, so they are off by less than one sentence per stream, not by chance.
    assert [total[i] for i in range(4)] == pytest.approx((expected * rows).tolist(), abs=2)


def test_heating_raises_the_small_streams_share_during_training() -> None:
    made = plan(temperature=LinearHeating(1.0, 5.0, 10 * WINDOW))
    shares = []
    for window in (0, 5, 10, 20):
        total = Counter(stream for stream, _ in drawn(made, range(window * WINDOW, (window + 1) * WINDOW)))
        shares.append(total[3] / sum(total.values()))
    assert shares[0] < shares[1] < shares[2]
    assert shares[3] == pytest.approx(shares[2], rel=0.05)
    (at_5,) = sampling_probabilities(list(COUNTS.values()), np.array([5.0]))
    assert shares[3] == pytest.approx(at_5[list(COUNTS).index("xx-en")], rel=0.05)


def test_a_stream_with_a_fixed_share_keeps_it() -> None:
    made = plan(shares={"xx-en": 0.5})
    total = Counter(stream for stream, _ in drawn(made, range(WINDOW)))
    assert total[3] / sum(total.values()) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("budget", [600, 3000, 12000])
def test_steps_meet_the_budget_and_hold_little_padding(budget: int, two_sided: bool) -> None:
    streams = [sizes(name, count, two_sided=two_sided) for name, count in COUNTS.items()]
    made = plan(budget=budget, streams=streams)
    both = [positions(made, step) for step in range(3 * WINDOW, 5 * WINDOW)]
    padded, real = (np.array(column) for column in zip(*both, strict=True))
    assert padded.max() <= 1.05 * budget
    assert np.median(padded) >= 0.9 * budget
    waste = 1 - real.sum() / padded.sum()
    assert waste < (0.15 if two_sided else 0.08)
    assert made.padding == pytest.approx(waste, abs=0.03)
    assert made.rows_per_step == pytest.approx(np.mean([len(made.rows(k)) for k in range(WINDOW)]), rel=0.02)


def test_batches_do_not_come_by_length_nor_rows_by_length_or_stream() -> None:
    made = plan()
    length = [positions(made, step)[0] / len(made.rows(step)) for step in range(WINDOW)]
    assert abs(np.corrcoef(length, np.arange(WINDOW))[0, 1]) < 0.4
    by_stream, by_length = [], []
    for step in range(WINDOW):
        rows = made.rows(step)
        cost = [int(made.streams[s].cost[i]) for s, i in zip(rows.stream, rows.index, strict=True)]
        for values, found in ((rows.stream, by_stream), (cost, by_length)):
            if len(set(values)) > 1:
                found.append(abs(np.corrcoef(values, np.arange(len(rows)))[0, 1]))
    # Of unrelated columns of about 70 entries: mean 0.1. Sorted ones: 0.9.
    assert np.mean(by_stream) < 0.2
    assert np.mean(by_length) < 0.2


def test_where_a_row_stands_says_nothing_of_its_noise() -> None:
    """A capacity by position would else favour sentences whose first word is masked."""
    made = plan()
    place, draws = [], []
    for step in range(WINDOW):
        rows = made.rows(step)
        place.append(np.linspace(0, 1, len(rows)))
        draws.append([uniform(rows.keys, np.zeros(1, np.int64), number) for number in range(64)])
    for of_number in np.concatenate(draws, axis=1):
        assert abs(np.corrcoef(np.concatenate(place), of_number)[0, 1]) < 0.1  # of about 4,500: 0.015 by chance


@pytest.mark.parametrize("ranks", [1, 4, 10])
def test_every_rank_gets_sentences(ranks: int) -> None:
    made = plan(budget=1800, least_rows=ranks)
    assert min(len(made.rows(step)) for step in range(3 * WINDOW)) >= ranks


def test_many_ranks_may_exceed_a_small_budget_only_by_the_longest_sentences() -> None:
    made = plan(budget=400, least_rows=8)
    for step in range(WINDOW):
        padded, _ = positions(made, step)
        assert padded <= 1.1 * 400 or len(made.rows(step)) == 8


def test_a_budget_that_cannot_hold_the_longest_sentence_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget of the task translation must hold its longest sentence: got 50 "):
        plan(budget=50)


def test_a_task_without_sentences_is_refused() -> None:
    with pytest.raises(UserError, match="task translation needs training sentences"):
        plan(streams=[sizes("en-de", 0)])


def test_a_share_for_a_stream_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"must name its streams: got 'en-fr'; they are en-de"):
        plan(shares={"en-fr": 0.5})


def test_an_empty_stream_among_others_is_passed_over() -> None:
    made = plan(streams=[sizes("en-de", 50), sizes("de-en", 0)])
    assert {stream for stream, _ in drawn(made, range(WINDOW))} == {0}


def test_a_corpus_of_one_sentence_repeats_it() -> None:
    made = plan(streams=[Sizes("en", np.array([10]))], budget=25)
    assert all(len(made.rows(step)) >= 1 for step in range(2 * WINDOW))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 200), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_cut_makes_exactly_so_many_runs(batches: int, least: int, extra: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = batches * least + extra
    source = np.sort(np.exp(rng.normal(2.5, 0.8, size=count)).astype(np.int64) + 3)[::-1]
    target = rng.integers(3, 30, size=count) if seed % 2 else None
    begins = cut(source, target, batches, least)
    assert len(begins) == batches + 1
    assert (begins[0], begins[-1]) == (0, count)
    assert np.diff(begins).min() >= least


def test_fill_fills_to_the_brim() -> None:
    assert fill(np.array([5, 5, 5, 4, 4]), None, 10) == [0, 2, 4, 5]
    assert fill(np.array([5, 5, 5, 4, 4]), np.array([5, 5, 5, 4, 4]), 20) == [0, 2, 4, 5]
    assert fill(np.array([50, 3]), None, 10) == [0, 1, 2]
    assert fill(np.array([], dtype=np.int64), None, 10) == [0]
