"""The tasks that there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from moekit.tasks.causal_lm import CausalLMTask
from moekit.tasks.denoising import DenoisingTask
from moekit.tasks.head import Head
from moekit.tasks.masked_lm import MaskedLMTask
from moekit.tasks.replaced_token import ReplacedTokenTask
from moekit.tasks.span_corruption import SpanCorruptionTask
from moekit.tasks.task import Task
from moekit.tasks.translation import TranslationTask

_CLASSES: tuple[type[Task], ...] = (
    TranslationTask,
    DenoisingTask,
    SpanCorruptionTask,
    MaskedLMTask,
    ReplacedTokenTask,
    CausalLMTask,
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
