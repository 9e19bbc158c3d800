"""Many cases in one group of processes, each with a test of its own: starting processes costs more than most cases.

A test file ends with `CASES, outcome, test_case = in_one_group(__name__, 2, one_case, another_case)`.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from small_lm import quiet

from moekit.testing import run_distributed

Case = Callable[[], None]


class Room:
    """Where cases write."""

    path = Path()
    taken = 0


def folder() -> Path:
    """A new one, the same on all ranks."""
    Room.taken += 1
    return Room.path / str(Room.taken)


def all_failed(room: Path, name: str, seconds: float = 30.0) -> bool:
    """Whether every rank comes here soon. Ranks meet through files: their collectives no longer match."""
    (room / f"{name} failed on {dist.get_rank()}").touch()
    end = time.monotonic() + seconds
    while len(list(room.glob(f"{name} failed on *"))) < dist.get_world_size():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def run_cases(module: str, names: list[str], room: str) -> dict[str, str]:
    """What went wrong, by case.

    Raises:
        RuntimeError: if a case failed on this rank and went on on another, which would wait for it in the next one.
    """
    cases: Mapping[str, Case] = importlib.import_module(module).CASES
    found, Room.path = {}, Path(room)
    for name in names:
        try:
            with quiet():
                cases[name]()
        except BaseException as error:
            found[name] = traceback.format_exc()
            if not all_failed(Path(room), name):
                raise RuntimeError(f"{name} failed on rank {dist.get_rank()} and not on all") from error
    return found


def in_one_group(module: str, processes: int, *cases: Case) -> tuple[dict[str, Case], Any, Callable[..., None]]:
    """The cases by name, the fixture that runs those that are wanted in one group of processes, and their test."""
    by_name = {case.__name__: case for case in cases}

    @pytest.fixture(scope="module")
    def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
        wanted = [
            item.callspec.params["name"]
            for item in request.session.items
            if hasattr(item, "callspec") and item.path == request.path
        ]  # type: ignore[attr-defined]
        room = str(tmp_path_factory.mktemp("room"))
        return run_distributed(run_cases, processes, module, wanted, room, timeout=400.0)

    @pytest.mark.parametrize("name", by_name)
    def test_case(name: str, outcome: list[dict[str, str]]) -> None:
        for rank, found in enumerate(outcome):
            assert name not in found, f"on rank {rank}:\n{found[name]}"

    return by_name, outcome, test_case
