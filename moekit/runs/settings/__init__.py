"""Settings of a run: each dataclass with what it makes, each field with its range and where it may differ."""

from typing import TYPE_CHECKING

from moekit.lazy import lazy_names

if TYPE_CHECKING:
    from moekit.runs.settings.data import DataConfig
    from moekit.runs.settings.fields import RESUME, SURGERY, setting
    from moekit.runs.settings.monitor import MonitorConfig
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
    "MonitorConfig",
    "SpanCorruptionTasks",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "TranslationTasks",
    "active_tasks",
    "setting",
]

if not TYPE_CHECKING:  # where every name would be one
    __getattr__ = lazy_names(
        __name__,
        {
            "DataConfig": "data",
            "MonitorConfig": "monitor",
            **dict.fromkeys(("RESUME", "SURGERY", "setting"), "fields"),
            **dict.fromkeys(("EvaluateConfig", "LanguageModelTasks", "SpanCorruptionTasks", "TaskConfig"), "tasks"),
            **dict.fromkeys(("TranslationTasks", "active_tasks"), "tasks"),
            **dict.fromkeys(("StrategyConfig", "TrainConfig"), "train"),
        },
    )
