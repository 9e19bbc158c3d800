"""The tasks that there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields, make_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from moekit.tasks.causal_lm import CausalLMTask
from moekit.tasks.denoising import DenoisingTask
from moekit.tasks.head import Head
from moekit.tasks.masked_lm import MaskedLMTask
from moekit.tasks.replaced_token import ReplacedTokenTask
from moekit.tasks.sequence import PairTask
from moekit.tasks.span_corruption import SpanCorruptionTask
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


def make_heads(
    tasks: Iterable[str], dim: int, label_smoothing: float, own: Mapping[str, Callable[[], Head]] | None = None
) -> list[Head]:
    """A head for each of some tasks, in their order.

    Args:
        tasks: their names.
        dim: channels of the backbone.
        label_smoothing: of the sequence-to-sequence tasks.
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
