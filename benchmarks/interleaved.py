"""What the benchmarks share: arms that take turns in one process, their times and memory, and how that is written.

Other programs and the machine's own clock change from second to second, so arms run in turn, round after round, and
what is reported are ratios to the first arm of the same round, the floor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.environment import environment

Step = Callable[[], None]


def peak_bytes(step: Step) -> int:
    """Bytes of tensors that were alive at once in a step, beyond those that were there before it.

    From torch's own record of what its allocator gave and took, so that arms of one process do not mix.
    """
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        if torch.cuda.max_memory_allocated() > before:
            return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    held = most = 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def interleaved(
    arms: Mapping[str, Step], rounds: int, warm_up: int = 2, wait: Callable[[], object] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm, round by round: ``{name: {"processor": [...], "wall": [...]}}``.

    A step begins and ends with `wait`: until all that was begun is done, by default on the GPU if there is one.
    """
    if wait is None:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in arms}
    for _ in range(warm_up):
        for step in arms.values():
            step()
    for _ in range(rounds):
        for name, step in arms.items():
            wait()
            wall, processor = time.perf_counter(), time.process_time()
            step()
            wait()
            seconds[name]["processor"].append(time.process_time() - processor)
            seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def compared(seconds: Mapping[str, Mapping[str, list[float]]], floor: str) -> dict[str, dict[str, Any]]:
    """Each arm beside the floor: medians, minima, and both as a multiple of the floor's."""
    found: dict[str, dict[str, Any]] = {}
    for name, clocks in seconds.items():
        found[name] = {}
        for clock, values in clocks.items():
            base = seconds[floor][clock]
            found[name][clock] = {
                "median_seconds": statistics.median(values),
                "least_seconds": min(values),
                "median_ratio": statistics.median([a / b for a, b in zip(values, base, strict=True)]),
                "ratio_of_least": min(values) / min(base),
            }
    return found


def counted(text: str) -> int:
    """The type of an option that counts something: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number: got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: got {text}")
    return number


def written(text: str) -> Path:
    """The type of an option that names a file to write: that it cannot be is said before minutes of measuring."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that is there: got {text!r}")
    return path


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """The result with what it was measured on, commit included; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps({**result, "environment": environment()}, indent=2) + "\n", encoding="utf-8")


def refuse(reason: str) -> None:
    """End without a report."""
    sys.exit(f"refusing to report: {reason}")
