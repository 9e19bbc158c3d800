"""`TaskData`: what can be set about the text of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moekit.data.mixture import TemperatureSchedule
from moekit.errors import UserError
from moekit.tasks.denoising import Denoising
from moekit.tasks.masked_lm import Masking
from moekit.tasks.registry import TASKS
from moekit.tasks.span_corruption import SpanCorruption


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of one task, of which each task reads what is its own.

    Attributes:
        share: of a step's tokens, relative to the other tasks.
        streams: directions (``en-de``) for tasks on pairs such as translation, languages for the others; None = all of
            the source.
        temperature: of the mixture over streams; None = that of the data module.
        stream_shares: streams that are drawn with a fixed probability, whatever the temperature.
        denoising: how sentences are damaged, for the task denoising.
        span_corruption: how spans are cut out, for the task span_corruption.
        masking: how sentences are masked, for masked_lm and replaced_token; None = as BERT does for masked_lm, as
            ELECTRA's generator sees it (the mask alone) for replaced_token.
        sentinel: for tasks on pairs: the first sentinel ends the source and begins the target, as in span corruption,
            so that fine-tuning looks like such a pre-training (arXiv:2202.08906 section 4).
    """

    share: float = 1.0
    streams: tuple[str, ...] | None = None
    temperature: TemperatureSchedule | None = None
    stream_shares: Mapping[str, float] = field(default_factory=dict)
    denoising: Denoising = field(default_factory=Denoising)
    span_corruption: SpanCorruption = field(default_factory=SpanCorruption)
    masking: Masking | None = None
    sentinel: bool = field(default=False, repr=False)


def task_data(tasks: Mapping[str, Any], data: Any) -> dict[str, TaskData]:
    """The text of a run's tasks, by name.

    Args:
        tasks: that train: each by name, with its tokens in a step (``TaskConfig``).
        data: the data settings of a recipe (``DataConfig``).

    Raises:
        UserError: if they are none for one of the tasks.
    """
    made = {}
    for name, task in tasks.items():
        try:
            made[name] = TaskData(share=float(task.tokens), **TASKS[name].configured(data))
        except ValueError as error:
            raise UserError(f"the noise of the task {name} in data: {error}") from None
    return made
