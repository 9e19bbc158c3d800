"""What a run may use, in steps or in minutes, and how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Budget:
    """A limit in optimizer steps, in minutes of wall-clock time, or both: the first that is reached ends the run.

    A learning rate schedule asks `fraction`. Without `max_minutes` that is a pure function of the step, and a
    resumed run equals one that was never stopped. With it, the learning rate depends on the machine's speed.

    Attributes:
        max_steps: optimizer steps, or None.
        max_minutes: minutes of training, validation in between included, or None.
        seconds: time used so far; `MaxMinutes` keeps it, and keeps it in checkpoints.

    Raises:
        ValueError: no limit, or a limit that is not positive.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Budget.{name} must be positive or None: got {value}.")
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("Budget needs max_steps, max_minutes or both: got neither.")

    def fraction(self, step: int) -> float:
        """Part of the budget used after `step` optimizer steps, from 0 to 1."""
        steps = 0.0 if self.max_steps is None else step / self.max_steps
        minutes = 0.0 if self.max_minutes is None else self.seconds / 60 / self.max_minutes
        return min(1.0, max(steps, minutes))

    @property
    def out_of_time(self) -> bool:
        """Whether the minutes are used up."""
        return self.max_minutes is not None and self.seconds >= 60 * self.max_minutes
