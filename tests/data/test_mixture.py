from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moekit.data.mixture import (
    HEATING_FORMS,
    Constant,
    LinearHeating,
    SquareRootHeating,
    StepHeating,
    TemperatureSchedule,
    heating,
    sampling_probabilities,
)
from moekit.errors import UserError

SIZES = [30_000, 3_000, 300]


def at(temperature: float, **changes: Any) -> np.ndarray[Any, Any]:
    return sampling_probabilities(SIZES, np.array([temperature]), **changes)[0]


def test_temperature_one_samples_by_size() -> None:
    assert at(1.0) == pytest.approx(np.array(SIZES) / sum(SIZES))


def test_temperature_five_is_the_fifth_root() -> None:
    shares = (np.array(SIZES) / sum(SIZES)) ** 0.2
    assert at(5.0) == pytest.approx(shares / shares.sum())


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 1.0, 7.0, 1e6])
def test_probabilities_sum_to_one_at_any_temperature(temperature: float) -> None:
    assert at(temperature).sum() == pytest.approx(1.0)
    assert (np.diff(at(temperature)) <= 0).all()


def test_a_large_temperature_makes_all_alike_and_a_small_one_takes_the_largest() -> None:
    assert at(1e9) == pytest.approx(1 / 3)
    assert at(1e-3) == pytest.approx([1, 0, 0])


def test_empty_streams_are_never_drawn() -> None:
    assert sampling_probabilities([5, 0], np.array([1e6]))[0].tolist() == [1.0, 0.0]


def test_a_fixed_share_leaves_the_rest_to_the_others() -> None:
    mixed = at(1.0, shares={2: 0.4})
    assert mixed == pytest.approx([0.6 * 10 / 11, 0.6 / 11, 0.4])
    assert at(3.0, shares={0: 0.5, 1: 0.25, 2: 0.25}) == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({0: 1.5}, "between 0 and 1: got 1.5"),
        ({0: 0.7, 1: 0.7}, "sum to at most 1: got 1.4"),
        ({0: 0.5, 1: 0.2, 2: 0.2}, "sum to 1: got 0.9"),
    ],
)
def test_impossible_shares_are_refused(shares: dict[int, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        at(1.0, shares=shares)


def test_constant_is_constant() -> None:
    assert {Constant(5.0)(step) for step in (0, 7, 10**9)} == {5.0}


def test_linear_heating_goes_from_start_to_end_and_stays() -> None:
    heating = LinearHeating(start=1.0, end=5.0, steps=100)
    assert [heating(step) for step in (0, 25, 50, 100, 1000)] == pytest.approx([1, 2, 3, 5, 5])


def test_square_root_heating_is_the_papers_formula() -> None:
    heating = SquareRootHeating(start=4.0, horizon=1000)
    for step in (0, 1, 10, 250, 999, 1000):
        assert heating(step) == pytest.approx((1 + step / 1000 * 4.0**0.5) ** 2)
    assert heating(0) == 1.0
    assert heating(5000) == heating(1000) == pytest.approx(9.0)


def test_step_heating_is_a_staircase() -> None:
    stairs = StepHeating((1.0, 2.0, 5.0), (10, 30))
    assert [stairs(step) for step in (0, 9, 10, 29, 30, 1000)] == [1.0, 1.0, 2.0, 2.0, 5.0, 5.0]


@pytest.mark.parametrize("form", HEATING_FORMS)
@pytest.mark.parametrize("end", [2.0, 5.0])
def test_heating_by_name_begins_at_one_and_ends_where_told(form: str, end: float) -> None:
    schedule = heating(form, end, 200)
    values = schedule.at(np.arange(0, 400))
    assert values[0] == 1.0
    assert values[200:] == pytest.approx(end)
    assert (np.diff(values) >= -1e-12).all()
    assert heating(form, end, 0) == Constant(end)


def test_forms_of_heating_differ() -> None:
    half = [heating(form, 5.0, 200)(100) for form in HEATING_FORMS]
    assert half == pytest.approx([3.0, (1 + 0.5 * (5**0.5 - 1)) ** 2, 1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("squareroot", 5.0, 10),
            r"got 'squareroot'\. Did you mean 'square_root'\? There are: linear, square_root, step",
        ),
        (("linear", 0.0, 10), "positive temperature .* got 0 in 10 steps"),
        (("linear", 5.0, -1), "not negative: got 5 in -1 steps"),
        (("square_root", 0.5, 10), "rises from 1: got an end of 0.5"),
    ],
)
def test_impossible_heating_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        heating(*arguments)


@pytest.mark.parametrize("schedule", [Constant(2.0), LinearHeating(), SquareRootHeating(), StepHeating()])
def test_schedules_answer_for_many_steps_at_once(schedule: TemperatureSchedule) -> None:
    steps = np.array([0, 1, 500, 20_000])
    assert schedule.at(steps).tolist() == [schedule(int(step)) for step in steps]
    assert eval(repr(schedule)) == schedule, "a schedule is shown as it is written, so that runs can be compared"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0.0), "temperature must be a positive temperature: got 0.0"),
        (lambda: LinearHeating(start=-1.0), "start must be a positive temperature"),
        (lambda: LinearHeating(steps=0), "steps must be at least 1 step: got 0"),
        (lambda: StepHeating((1.0,), (5,)), "got 1 temperatures and 1 steps"),
        (lambda: StepHeating((1.0, -2.0), (5,)), "temperatures must be a positive temperature: got -2.0"),
        (lambda: StepHeating((1.0, 2.0, 3.0), (5, 5)), r"must rise: got \(5, 5\)"),
        (lambda: StepHeating((1.0, 2.0), (0,)), "steps must be at least 1 step: got 0"),
        (lambda: SquareRootHeating(horizon=0), "horizon must be at least 1 step: got 0"),
    ],
)
def test_impossible_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
