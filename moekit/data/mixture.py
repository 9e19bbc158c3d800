"""How often each direction or language is seen: temperature sampling, and temperatures that rise during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moekit.errors import UserError


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
