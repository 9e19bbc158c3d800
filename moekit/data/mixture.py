"""How often each direction or language is seen: temperature sampling, and temperatures that rise during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.errors import UserError, nearest


class TemperatureSchedule(ABC):
    """A sampling temperature for every training step: 1 = streams by size, large = all streams equally often."""

    @abstractmethod
    def at(self, step: NDArray[np.int64]) -> NDArray[np.float64]:
        """Temperature at each of the given steps."""

    def __call__(self, step: int) -> float:
        """Temperature at one step."""
        return float(self.at(np.array([step]))[0])


@dataclass(frozen=True)
class Constant(TemperatureSchedule):
    """The same temperature throughout.

    Source: arXiv:1907.05019 section 3.2 (T = 5).
    """

    temperature: float = 5.0

    def __post_init__(self) -> None:
        _check_temperature("temperature", self.temperature)

    def at(self, step: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: D102
        return np.full(step.shape, float(self.temperature))


@dataclass(frozen=True)
class LinearHeating(TemperatureSchedule):
    """From `start` to `end` in `steps` steps, then constant.

    Source: temperature heating of arXiv:2110.08246, linear form; the values are ours.
    """

    start: float = 1.0
    end: float = 5.0
    steps: int = 10_000

    def __post_init__(self) -> None:
        _check_temperature("start", self.start)
        _check_temperature("end", self.end)
        _check_steps("steps", self.steps)

    def at(self, step: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: D102
        return self.start + (self.end - self.start) * np.minimum(step / self.steps, 1.0)


@dataclass(frozen=True)
class SquareRootHeating(TemperatureSchedule):
    """``T_k = (1 + (k / horizon) * sqrt(start))^2``: 1 at the first step, (1 + sqrt(start))^2 at the horizon.

    `start` is the paper's T_0, which is not the temperature of step 0. `heating` takes the end temperature instead.

    Source: "Tricks for Training Sparse Translation Models", arXiv:2110.08246, square-root heating.
    Differs: constant after the horizon (the paper's behaviour there is not known to us).
    """

    start: float = 1.0
    horizon: int = 10_000

    def __post_init__(self) -> None:
        _check_temperature("start", self.start)
        _check_steps("horizon", self.horizon)

    def at(self, step: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: D102
        return (1.0 + np.minimum(step / self.horizon, 1.0) * np.sqrt(self.start)) ** 2


@dataclass(frozen=True)
class StepHeating(TemperatureSchedule):
    """A staircase: ``temperatures[i]`` until step ``steps[i]``, and the last one from then on.

    Source: temperature heating of arXiv:2110.08246; the form is ours.
    """

    temperatures: tuple[float, ...] = (1.0, 5.0)
    steps: tuple[int, ...] = (10_000,)

    def __post_init__(self) -> None:
        if len(self.temperatures) != len(self.steps) + 1:
            raise ValueError(
                "StepHeating needs one temperature more than it has steps: got "
                f"{len(self.temperatures)} temperatures and {len(self.steps)} steps."
            )
        for temperature in self.temperatures:
            _check_temperature("temperatures", temperature)
        for before, step in zip((0, *self.steps), self.steps, strict=False):
            _check_steps("steps", step)
            if step <= before:
                raise ValueError(f"StepHeating.steps must rise: got {self.steps}.")

    def at(self, step: NDArray[np.int64]) -> NDArray[np.float64]:  # noqa: D102
        return np.asarray(self.temperatures)[np.searchsorted(self.steps, step, side="right")]


HEATING_FORMS = ("linear", "square_root", "step")


def heating(form: str, end: float, steps: int) -> TemperatureSchedule:
    """A temperature that rises from 1 to `end` within `steps` steps, by the name of its form: for configurations.

    "linear", "square_root" (the paper's form, whose constant is chosen so that `end` is reached at `steps`) or "step"
    (one jump, at `steps`). With ``steps=0`` the temperature is `end` throughout.

    Raises:
        UserError: if there is no such form, or it cannot reach `end`.

    Source: arXiv:2110.08246; the constant temperature arXiv:1907.05019 section 3.2.
    """
    if form not in HEATING_FORMS:
        raise UserError(f"The form of heating must be a known one: got {form!r}. {nearest(form, HEATING_FORMS)}")
    if steps < 0 or not end > 0:
        raise UserError(
            f"Heating needs a positive temperature and steps that are not negative: got {end:g} in {steps} steps."
        )
    if steps == 0:
        return Constant(end)
    if form == "linear":
        return LinearHeating(1.0, end, steps)
    if form == "step":
        return StepHeating((1.0, end), (steps,))
    if not end > 1:
        raise UserError(f'Heating of the form "square_root" rises from 1: got an end of {end:g}. Use "linear".')
    return SquareRootHeating((end**0.5 - 1.0) ** 2, steps)


def _check_temperature(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be a positive temperature: got {value}.")


def _check_steps(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step: got {value}.")


def sampling_probabilities(
    sizes: Sequence[int],
    temperature: NDArray[np.float64],
    shares: Mapping[int, float] | None = None,
) -> NDArray[np.float64]:
    """``q_l = (n_l / N)^(1/T)``, normalised, for each of W temperatures.

    Args:
        sizes: sentences of each of L streams; a stream without any is never drawn.
        temperature: Float[W].
        shares: probabilities that some streams have whatever the temperature; the others share the rest.

    Returns:
        Float64[W, L], rows sum to 1.

    Source: arXiv:1907.05019 section 3.2.
    """
    shares = shares or {}
    n = np.asarray(sizes, dtype=np.float64)
    fixed = np.zeros(len(n))
    for index, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"A stream's share must be between 0 and 1: got {share}.")
        fixed[index] = share
    free = np.array([i not in shares for i in range(len(n))]) & (n > 0)
    rest = 1.0 - fixed.sum()
    if rest < -1e-9 or (not free.any() and abs(rest) > 1e-9):
        raise UserError(
            f"The shares of streams must sum to {'1' if not free.any() else 'at most 1'}: got {fixed.sum():g}. Change "
            "`shares`."
        )
    # The largest stream is 1 before the power, so that a high power of a small ratio cannot underflow them all.
    relative = np.where(free, n / max(n[free].max(initial=0.0), 1.0), 0.0)
    weight = np.where(free, relative[None, :] ** (1.0 / temperature[:, None]), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return fixed + max(rest, 0.0) * weight / np.where(total > 0, total, 1.0)
