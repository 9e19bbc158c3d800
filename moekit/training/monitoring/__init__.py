"""What is watched in training: counts of sparse layers, spikes of loss and gradient norm, and what is said of them.

`RoutingMonitor` of `moekit.training` does it under Lightning, `TrainingWatch` in a loop of one's own.
"""

from moekit.training.monitoring.rules import MonitorWarning, Thresholds, Warned
from moekit.training.monitoring.watch import TrainingWatch

__all__ = ["MonitorWarning", "Thresholds", "TrainingWatch", "Warned"]
