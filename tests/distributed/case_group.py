"""Many cases in one group of processes, each with a test of its own: starting processes costs more than most cases.

A test file lists its cases in `CASES`, asks for the fixture that `outcome_in` makes, and looks its own name up.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from small_lm import quiet

from moekit.testing import run_distributed


class Room:
    """Where cases write."""

    path = Path()
    taken = 0


def folder() -> Path:
    """A new one, the same on all ranks."""
    Room.taken += 1
    return Room.path / str(Room.taken)


def run_cases(module: str, names: list[str], room: str) -> dict[str, str]:
    """What went wrong, by case."""
    cases: Mapping[str, Callable[[], None]] = importlib.import_module(module).CASES
    found, Room.path = {}, Path(room)
    for name in names:
        try:
            with quiet():
                cases[name]()
        except BaseException:
            found[name] = traceback.format_exc()
    return found


def outcome_in(module: str, processes: int, *, at_once: int | None = None) -> Callable[..., list[dict[str, str]]]:
    """A fixture that runs the cases that are wanted of a test file in one group of processes.

    Every layout's process groups keep threads until their process ends: with `at_once` only so many cases share one.
    """

    @pytest.fixture(scope="module")
    def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
        wanted = [
            item.callspec.params["name"]
            for item in request.session.items
            if hasattr(item, "callspec") and item.path == request.path
        ]  # type: ignore[attr-defined]
        room = str(tmp_path_factory.mktemp("room"))
        found: list[dict[str, str]] = [{} for _ in range(processes)]
        size = at_once or max(len(wanted), 1)
        for number, start in enumerate(range(0, len(wanted), size)):
            some, place = wanted[start : start + size], f"{room}/{number}"
            for mine, of_some in zip(
                found, run_distributed(run_cases, processes, module, some, place, timeout=400.0), strict=True
            ):
                mine |= of_some
        return found

    return outcome


def require_success(name: str, outcome: list[dict[str, str]]) -> None:
    """Fail with what a rank saw."""
    for rank, found in enumerate(outcome):
        assert name not in found, f"on rank {rank}:\n{found[name]}"
