"""Process groups are made once: what a fit made serves the next one of the same layout."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from moekit.parallel.layout import Layout
from moekit.parallel.mesh import World, build_meshes, forget_groups, host_group
from moekit.testing.distributed import run_distributed


def _groups() -> list[list[int]]:
    """Number of groups after each of three rounds, after forgetting and a fourth round, and sums in the groups."""
    known, sums = [], []
    for turn in range(4):
        if turn == 3:
            forget_groups()
        for zero_stage in (0, 3):
            layout = Layout(devices=2, expert_parallel_size=2, zero_stage=zero_stage)  # type: ignore[arg-type]
            meshes = build_meshes(layout, "cpu", World("cpu", 1, timedelta(seconds=30)))
            one = torch.ones(1)
            dist.all_reduce(one, group=meshes.expert_group)
            dist.all_reduce(one, group=host_group("test", timedelta(seconds=30)))
            sums.append(int(one))
        known.append(len(dist.distributed_c10d._world.pg_map))
    return [known, sums]


def test_a_layout_makes_its_groups_once() -> None:
    for known, sums in run_distributed(_groups, 2):
        assert known[0] == known[1] == known[2] < known[3]
        assert sums == [4] * 8
