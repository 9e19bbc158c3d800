"""Training with Lightning: strategy, modules, optimizers, schedules, callbacks, metrics and checkpoints."""

from typing import TYPE_CHECKING

from moekit.lazy import lazy_names

if TYPE_CHECKING:
    from moekit.training.callbacks.routing_monitor import RoutingMonitor
    from moekit.training.monitoring import MonitorWarning, Thresholds, TrainingWatch

__all__ = ["MonitorWarning", "RoutingMonitor", "Thresholds", "TrainingWatch"]

if not TYPE_CHECKING:  # where every name would be one
    __getattr__ = lazy_names(
        __name__,
        {
            "RoutingMonitor": "callbacks.routing_monitor",
            **dict.fromkeys(("MonitorWarning", "Thresholds", "TrainingWatch"), "monitoring"),
        },
    )
