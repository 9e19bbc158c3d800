"""Settings of a run: each dataclass with what it makes, each field with its range and where it may differ."""

from moekit.runs.settings.data import DataConfig
from moekit.runs.settings.fields import RESUME, SURGERY, setting
from moekit.runs.settings.tasks import (
    EvaluateConfig,
    LanguageModelTasks,
    SpanCorruptionTasks,
    TaskConfig,
    TranslationTasks,
    active_tasks,
)
from moekit.runs.settings.train import StrategyConfig, TrainConfig

__all__ = [
    "RESUME",
    "SURGERY",
    "DataConfig",
    "EvaluateConfig",
    "LanguageModelTasks",
    "SpanCorruptionTasks",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "TranslationTasks",
    "active_tasks",
    "setting",
]
