"""The tasks that there are, and what can be set about the text of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from moekit.data.mixture import TemperatureSchedule
from moekit.data.salient import require_use
from moekit.errors import UserError
from moekit.tasks.causal_lm import CausalLMTask
from moekit.tasks.denoising import Denoising, DenoisingTask
from moekit.tasks.head import Head
from moekit.tasks.masked_lm import MaskedLMTask, Masking
from moekit.tasks.replaced_token import ReplacedTokenTask
from moekit.tasks.sequence import PairTask
from moekit.tasks.span_corruption import SpanCorruption, SpanCorruptionTask
from moekit.tasks.task import Task
from moekit.tasks.text_to_text import TextToTextTask
from moekit.tasks.translation import TranslationTask

_T = TypeVar("_T")

_CLASSES: tuple[type[Task], ...] = (
    TranslationTask,
    DenoisingTask,
    SpanCorruptionTask,
    MaskedLMTask,
    ReplacedTokenTask,
    CausalLMTask,
    TextToTextTask,
)
TASKS: Mapping[str, type[Task]] = MappingProxyType({task.name: task for task in _CLASSES})
"""Tasks by name."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The data of one task, of which each task reads what is its own.

    Attributes:
        share: share of a step's tokens, relative to the other tasks.
        streams: directions (``en-de``) for tasks on pairs such as translation, languages for the others; None = all of
            the source.
        temperature: temperature of the mixture over streams; None = that of the data module.
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


def task_data(tasks: Mapping[str, Any], data: Any, *, kept: bool = False) -> dict[str, TaskData]:
    """The text of a run's tasks, by name.

    Args:
        tasks: that train: each by name, with its tokens in a step (``TaskConfig``).
        data: the data settings of a recipe (``DataConfig``).
        kept: whether the text is what a run kept for evaluation, whose words are known.

    Raises:
        UserError: if they are none for one of the tasks, or say of salient words what no task uses.
    """
    made = {}
    for name, task in tasks.items():
        try:
            made[name] = TaskData(share=float(task.tokens), **TASKS[name].configured(data))
        except ValueError as error:
            raise UserError(f"the noise of the task {name} in data: {error}") from None
    if not kept:
        require_use(data.salient, data.salient_share, {name: TASKS[name].of(own) for name, own in made.items()})
    return made


def make_heads(
    tasks: Iterable[str], dim: int, label_smoothing: float, own: Mapping[str, Callable[[], Head]] | None = None
) -> list[Head]:
    """A head for each of some tasks, in their order.

    Args:
        tasks: their names.
        dim: channels of the backbone.
        label_smoothing: epsilon of the sequence-to-sequence tasks.
        own: what makes the heads of tasks that need more than that, by name.

    Raises:
        UserError: a task that needs more, and is not in `own`.
    """
    own = own or {}
    return [own[name]() if name in own else TASKS[name].make_head(dim, label_smoothing) for name in tasks]


def with_pair_tasks(setting: type[Any]) -> Callable[[type[_T]], type[_T]]:
    """Class decorator for the tasks of an encoder-decoder: every task on pairs can be chosen, as in fine-tuning.

    The dataclass gets a field for each such task that it lacks, behind its own and marked as ``offered`` in its
    metadata.

    Args:
        setting: type of the fields; what it makes without arguments leaves the task out.
    """

    def extended(cls: type[_T]) -> type[_T]:
        own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        more = {name: task for name, task in TASKS.items() if issubclass(task, PairTask) and name not in own}
        made = make_dataclass(
            cls.__name__,
            [(name, setting, field(default_factory=setting, metadata={"offered": True})) for name in more],
            bases=(cls,),
            frozen=True,
            kw_only=True,
        )
        lines = [f"    {name}: {task.about}" for name, task in more.items()]
        made.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), *lines])
        made.__module__, made.__qualname__ = cls.__module__, cls.__qualname__
        return made

    return extended
