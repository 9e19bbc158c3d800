"""How training is watched: thresholds of warnings, and what they lead to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.runs.settings.fields import setting
from moekit.training.monitoring import Thresholds

_ALLOWED = Thresholds()


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is watched in training, and what a warning leads to.

    Attributes:
        every: number of optimizer steps between two looks at the routers; 0 = as often as metrics.csv gets a row.
        on_spike: reaction to a loss or gradient norm far above its running median: warn says so, skip leaves out the
            step and stops after 10 in a row, stop leaves it out and ends the run. The last two wait for the device in
            every step.
        on_dead: reaction to dead experts: warn or stop.
        on_collapse: reaction to a router that sends all tokens to few experts: warn or stop.
        window: number of optimizer steps over which a sparse layer is judged.
        dead_share: part of a fair share (1 / number of experts) under which an expert is dead; 0 = never.
        max_load: fair shares of the busiest expert from which on a layer has collapsed; less where a layer cannot have
            so many.
        min_evenness: entropy of the load (1 = even, 0 = few experts get all tokens) under which a layer has collapsed.
        max_drop_rate: share of the assignments of a layer that may be dropped for capacity, from the second window on.
        max_logsumexp: mean logsumexp of a router's logits that is allowed.
        loss_spike: spreads above its running median from which on a loss is a spike.
        gradient_spike: spreads above its running median from which on a gradient norm is a spike.
        spike_window: number of optimizer steps that median and spread are of; of twice as many a spike is the largest.
    """

    every: int = setting(0, at_least=0)
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    on_dead: Literal["warn", "stop"] = "warn"
    on_collapse: Literal["warn", "stop"] = "warn"
    window: int = setting(_ALLOWED.window, at_least=1)
    dead_share: float = setting(_ALLOWED.dead_share, at_least=0, at_most=1)
    max_load: float = setting(_ALLOWED.max_load, at_least=1)
    min_evenness: float = setting(_ALLOWED.min_evenness, at_least=0, at_most=1)
    max_drop_rate: float = setting(_ALLOWED.max_drop_rate, at_least=0, at_most=1)
    max_logsumexp: float = setting(_ALLOWED.max_logsumexp, at_least=0)
    loss_spike: float = setting(_ALLOWED.loss_spike, at_least=0)
    gradient_spike: float = setting(_ALLOWED.gradient_spike, at_least=0)
    spike_window: int = setting(_ALLOWED.spike_window, at_least=2)
