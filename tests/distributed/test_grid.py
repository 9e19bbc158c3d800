"""The claim: the layout changes nothing. Every supported layout against plain PyTorch in one process.

For world sizes 1, 2 and 4, every combination of expert, tensor and replica sizes, ZeRO stage and offload that the
`Layout` accepts, loss and gradient norm of 5 steps (3 in the fast part) and every weight after them, for SGD with
momentum, AdamW and Adafactor, clipped, are compared with a loop of plain PyTorch on the same global batches.
Tolerance: a relative difference of 1e-5 of each loss, each norm, and of each weight tensor (measured: below 2e-6).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch.distributed as dist
from small_lm import SmallLM, differences, fit, one_process, quiet, sentences

from moekit import ExpertParallelStrategy
from moekit.parallel import Layout
from moekit.testing import run_distributed

TOLERANCE = 1e-5
OFFLOADS, OPTIMIZERS = ("none", "optimizer", "parameters"), ("sgd", "adamw", "adafactor")
Case = tuple[int, int, int, int, str, str]


def layouts(world: int) -> list[tuple[int, int, int, int, str]]:
    """(expert, tensor, replicas, zero_stage, offload) of all layouts of `world` processes."""
    found = []
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for expert, tensor, replicas, stage, offload in itertools.product(sizes, sizes, sizes, range(4), OFFLOADS):
        try:
            Layout(
                devices=world,
                expert_parallel_size=expert,
                tensor_parallel_size=tensor,
                replicas=replicas,
                zero_stage=stage,  # type: ignore[arg-type]
                offload=offload,  # type: ignore[arg-type]
            )
        except ValueError:
            continue
        found.append((expert, tensor, replicas, stage, offload))
    return found


def product(world: int) -> list[Case]:
    return [(*layout, optimizer) for layout in layouts(world) for optimizer in OPTIMIZERS]


def covering(world: int) -> list[Case]:
    """Every arrangement of ranks with every stage; offload and optimizer take turns within a stage."""
    # In three turns each offload and each optimizer has been there, in nine each pair.
    pairs = [(OFFLOADS[n % 3], OPTIMIZERS[(n + n // 3) % 3]) for n in range(9)]
    turns = [itertools.cycle(pairs) for _ in range(4)]
    arrangements = dict.fromkeys(layout[:4] for layout in layouts(world))
    return [(*found, *next(turns[found[3]])) for found in arrangements]


def train(cases: list[Case], steps: int, expected: dict[str, Any]) -> list[dict[str, float]]:
    found = []
    for expert, tensor, replicas, stage, offload, optimizer in cases:
        strategy = ExpertParallelStrategy(
            expert,
            tensor_parallel_size=tensor,
            replicas=replicas,
            zero_stage=stage,  # type: ignore[arg-type]
            offload=offload,  # type: ignore[arg-type]
        )
        with quiet():
            result = fit(SmallLM(optimizer), strategy, sentences(steps))
        found.append(differences(result, expected[optimizer]))
        assert strategy.meshes.layout.devices == dist.get_world_size()
    return found


def check(cases: list[Case], world: int, steps: int, timeout: float) -> None:
    expected = {optimizer: one_process(SmallLM(optimizer), sentences(steps)) for optimizer in OPTIMIZERS}
    worst = 0.0
    # Every layout's groups keep threads until their process ends, and a hundred layouts' would take the machine.
    for some in [cases[i : i + 16] for i in range(0, len(cases), 16)]:
        results = run_distributed(train, world, some, steps, expected, timeout=timeout)
        for rank, found in enumerate(results):
            for case, difference in zip(some, found, strict=True):
                assert max(difference.values()) < TOLERANCE, f"{case} on rank {rank}: {difference}"
                worst = max(worst, *difference.values())
    print(f"\n{len(cases)} cases on {world} processes, largest relative difference {worst:.1e}")


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_covering_layouts_equal_one_process(world: int) -> None:
    check(covering(world), world, steps=3, timeout=400.0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_layouts_equal_one_process(world: int) -> None:
    check(product(world), world, steps=5, timeout=3000.0)


def test_grid_is_what_it_claims() -> None:
    """How many cases there are, and that the fast part shows every value of every option with every stage."""
    assert {world: len(product(world)) for world in (1, 2, 4)} == {1: 36, 2: 126, 4: 288}
    assert {world: len(covering(world)) for world in (1, 2, 4)} == {1: 4, 2: 14, 4: 32}
    cases = [case for world in (1, 2, 4) for case in covering(world)]
    for stage in (0, 1, 2, 3):
        mine = [case for case in cases if case[3] == stage]
        assert {case[0] for case in mine} == {case[1] for case in mine} == {1, 2, 4}
        assert {case[2] for case in mine} == ({1, 2, 4} if stage > 1 else {1})
        assert {case[4] for case in mine} == set(OFFLOADS)
        assert {case[5] for case in mine} == set(OPTIMIZERS)
