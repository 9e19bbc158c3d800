"""Training tasks, one file each: the text that a task needs, its noise, its batches, its head and loss, its scores and
the words that reports say about it.
"""

from moekit.tasks.causal_lm import CausalLMTask
from moekit.tasks.denoising import Denoising, DenoisingTask
from moekit.tasks.masked_lm import MaskedLMTask, Masking
from moekit.tasks.registry import TASKS, TaskData, make_heads, task_data, with_pair_tasks
from moekit.tasks.replaced_token import ELECTRA, ReplacedTokenTask
from moekit.tasks.span_corruption import SpanCorruption, SpanCorruptionTask
from moekit.tasks.task import SampleWording, Task
from moekit.tasks.translation import TranslationScore, TranslationTask

__all__ = [
    "ELECTRA",
    "TASKS",
    "CausalLMTask",
    "Denoising",
    "DenoisingTask",
    "MaskedLMTask",
    "Masking",
    "ReplacedTokenTask",
    "SampleWording",
    "SpanCorruption",
    "SpanCorruptionTask",
    "Task",
    "TaskData",
    "TranslationScore",
    "TranslationTask",
    "make_heads",
    "task_data",
    "with_pair_tasks",
]
