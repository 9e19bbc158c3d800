"""Adapters follow the axes of their matrices: divided over processes they train to the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_lm import SmallLM, differences, fit, one_process, quiet, sentences

from moekit import ExpertParallelStrategy
from moekit.surgery.adapters import add_adapters, is_adapter
from moekit.testing import run_distributed, seeded
from moekit.training.fine_tuning import subset, train_only

CASES = [(2, 1, 0), (2, 1, 3), (1, 2, 0), (1, 2, 2), (1, 1, 3)]
"""Sizes of expert and tensor parallelism on two processes, and the stage of ZeRO."""


def adapted() -> SmallLM:
    """With pairs on every matrix, as if they had been trained a little; they alone train."""
    module = SmallLM("adamw")
    with seeded(5):
        add_adapters(module, rank=2, alpha=2.0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if is_adapter(name):
                    parameter.normal_(std=0.3)
    train_only(module, subset("adapters"))
    return module


def train(cases: list[tuple[int, int, int]], expected: dict[str, Any]) -> list[dict[str, float]]:
    found = []
    for expert, tensor, stage in cases:
        strategy = ExpertParallelStrategy(expert, tensor_parallel_size=tensor, zero_stage=stage)  # type: ignore[arg-type]
        with quiet():
            found.append(differences(fit(adapted(), strategy, sentences()), expected))
    return found


@pytest.mark.slow
def test_divided_adapters_train_as_whole_ones() -> None:
    before = {name: p.detach().clone() for name, p in adapted().named_parameters()}
    expected = one_process(adapted(), sentences())
    moved = {name for name, p in expected["weights"].items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if is_adapter(name)}
    for found in run_distributed(train, 2, CASES, expected, timeout=300.0):
        for case, difference in zip(CASES, found, strict=True):
            assert max(difference.values()) < 1e-5, f"{case}: {difference}"
