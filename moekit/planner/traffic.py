"""Bytes that each device sends in a step, by formula.

Collectives are counted as rings send them: of S bytes among n devices, gathering and scattering send S (n - 1) / n
each, a sum that all need sends twice that, and an all-to-all sends what is not for the sender.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moekit.parallel.layout import Layout, Training
from moekit.planner.census import Census
from moekit.planner.memory import local_shape, sharded_shape, sharers


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that each device sends per optimizer step.

    Attributes:
        all_to_all: tokens to experts and results back.
        all_gather: weights that ZeRO divides, and the logits of tensor-parallel partners.
        reduce_scatter: gradients, each device keeping its part.
        all_reduce: gradients that all devices keep, and the sums of tensor parallelism.
    """

    all_to_all: float
    all_gather: float
    reduce_scatter: float
    all_reduce: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.all_to_all + self.all_gather + self.reduce_scatter + self.all_reduce


def traffic_of(census: Census, layout: Layout, training: Training) -> Traffic:
    """Bytes per step: weights and tokens for every micro-batch; gradients once, which stage 3 divides in each."""
    numbers, stage, micro = training.numbers, layout.zero_stage, training.accumulate
    gather = scatter = reduce = exchange = 0.0
    # Forward and backward; checkpointing repeats the forward.
    passes = 3 if training.checkpointing else 2
    away = 1 - 1 / layout.expert_parallel_size
    beyond = 1 - 1 / layout.tensor_parallel_size
    for unit in census.units:
        # Out as the residual stream is, back as the experts give it.
        exchange += unit.count * passes * micro * unit.cost.sent * (numbers.stream + numbers.compute) * away
        summed = unit.cost.summed_forward * (passes - 1) + unit.cost.summed_backward
        reduce += unit.count * 2 * beyond * micro * summed * numbers.compute
        gather += unit.count * beyond * micro * unit.logits * numbers.compute
        for weight in unit.weights:
            full = unit.count * math.prod(local_shape(weight, layout))
            part = unit.count * math.prod(sharded_shape(weight, layout))
            among = sharers(weight, layout)
            rest = 1 - 1 / among
            if stage >= 2:
                times = micro * (2 if stage == 3 else 1)
                gather += times * full * (numbers.gathered if unit.kind == "block" else numbers.weight) * rest
                scatter += (micro if stage == 3 else 1) * weight.trained * full * numbers.gradient * rest
                reduce += weight.trained * 2 * part * numbers.gradient * (1 - 1 / layout.replicas)
            else:
                copies = among * layout.replicas
                reduce += weight.trained * 2 * full * numbers.gradient * (1 - 1 / copies)
                gather += weight.trained * full * numbers.weight * rest if stage == 1 else 0.0
    return Traffic(all_to_all=exchange, all_gather=gather, reduce_scatter=scatter, all_reduce=reduce)
