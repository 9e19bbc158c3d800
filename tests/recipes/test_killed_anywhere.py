"""kill -9 at random instants of a whole run, from its first moment to its test: resumed, it equals one never killed."""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import killed_recipe
import pytest
import torch

from moekit.training.checkpoint_state import load_state

SETTINGS = [
    "--model.dim=16", "--model.heads=2", "--model.hidden_dim=32", "--model.num_experts=2", "--data.babel_sentences=60",
    "--data.vocab_size=400", "--train.warmup_steps=1", "--train.accelerator=cpu", "--train.log_every=1",
    "--train.max_steps=24", "--train.max_minutes=0", "--train.validate_every=5", "--train.checkpoint_steps=2",
    "--train.checkpoint_minutes=0", "--evaluate.max_sentences=8", "--model.dropout=0.1",
]  # fmt: skip
LAYOUTS = {1: [], 2: ["--devices=2", "--strategy.expert_parallel_size=2", "--strategy.zero_stage=2"]}
PARTS = {(1, 0): 25, (1, 1): 25, (2, 0): 25, (2, 1): 25}
"""How many times processes are killed, by the number of processes and the part of the test."""
CLOCK = re.compile(r"second|minute|memory|bytes|flops")


class Killed:
    """A run in a folder, which is started again and again."""

    def __init__(self, folder: Path, cache: Path, world: int) -> None:
        self.run, self.world = folder / "run", world
        self.folder, self.cache = folder, cache
        self.arguments = [*SETTINGS, *LAYOUTS[world], f"--out={self.run}", f"--data.cache={cache}", "--resume"]

    def start(self) -> list[BaseProcess]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning", "torch._dynamo", "moekit.recipes.switch", "moekit.report"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder.mkdir(exist_ok=True)
        made: list[BaseProcess] = [
            context.Process(
                target=killed_recipe.in_process,
                args=(self.arguments, rank, self.world, port, self.folder / f"log{rank}.txt"),
            )
            for rank in range(self.world)
        ]
        for process in made:
            process.start()
        return made

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log*.txt")))

    def finish(self) -> None:
        processes = self.start()
        for process in processes:
            process.join(timeout=400)
        assert [process.exitcode for process in processes] == [0] * self.world, self.logs()

    def kill(self, after: float, rank: int) -> str | None:
        """Kill one process after so many seconds; where in its work the run was, or None if it had ended."""
        processes = self.start()
        processes[rank].join(timeout=after)
        if processes[rank].exitcode is not None:
            for process in processes:
                process.join(timeout=400)
            assert [process.exitcode for process in processes] == [0] * self.world, self.logs()
            return None
        processes[rank].kill()
        stage, others = self.stage(), [process for process in processes if process is not processes[rank]]
        for process in others:
            self._wait_for_survivor(process, stage)
        processes[rank].join()
        return stage

    def _wait_for_survivor(self, process: BaseProcess, stage: str) -> None:
        """Until it ends, which it does by itself once the processes have met.

        Before, it waits for the killed one to come, half an hour by default. Who started it ends it then, as torchrun
        does.
        """
        assert process.pid is not None
        for seconds in range(60):
            process.join(timeout=1)
            if process.exitcode is not None:
                return
            if seconds % 10 == 4:
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.5)
                if "in _create_c10d_store" in self.logs():
                    process.kill()
                    process.join()
                    return
        process.kill()
        raise AssertionError(f"a process outlives a killed one by a minute, {stage}:\n{self.logs()}")

    def stage(self) -> str:
        """By what lies in the folder."""
        if list(self.run.glob("checkpoints/.*.tmp")):
            return "in the writing of a checkpoint"
        if (rows := self.rows()) is None:
            return "before the first step"
        return "at the end or in the test" if len(rows) >= 24 else "in training or validation"

    def rows(self) -> list[dict[str, str]] | None:
        path = self.run / "metrics.csv"
        if not path.exists():
            return None
        found = list(csv.DictReader(path.read_text().splitlines()))
        return [{name: value for name, value in row.items() if not CLOCK.search(name)} for row in found]

    def end(self) -> tuple[Any, dict[str, torch.Tensor], Any]:
        """Rows, weights of both checkpoints, and what the test has found."""
        weights = {
            f"{name} {key}": value
            for name in ("last", "best")
            for key, value in load_state(self.run / "checkpoints" / f"{name}.ckpt").weights.items()
        }
        summary = json.loads((self.run / "summary.json").read_text())
        tested = {name: summary[name] for name in ("steps", "evaluated_step", "loss", "accuracy", "test", "tokens")}
        return self.rows(), weights, (tested, json.loads((self.run / "samples.json").read_text()))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Killed, float]]:
    """Of a number of processes the run that is never killed, and its seconds."""

    @functools.cache
    def whole(world: int) -> tuple[Killed, float]:
        folder = tmp_path_factory.mktemp(f"whole{world}")
        Killed(folder / "first", folder / "cache", world).finish()  # which fills the cache, and imports everything
        run, began = Killed(folder / "whole", folder / "cache", world), time.monotonic()
        run.finish()
        return run, time.monotonic() - began

    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("world", "part"), PARTS)
def test_a_run_that_is_killed_anywhere_equals_one_that_is_not(
    world: int,
    part: int,
    whole_runs: Callable[[int], tuple[Killed, float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, length = whole_runs(world)
    rows, weights, tested = whole.end()
    assert rows is not None
    assert [row["step"] for row in rows][:24] == [str(step) for step in range(24)]
    draw = random.Random(10 * world + part)
    stages: Counter[str] = Counter()
    runs = 0
    while sum(stages.values()) < PARTS[world, part]:
        runs += 1
        run = Killed(tmp_path / f"run{runs}", whole.cache, world)
        for _ in range(6):  # and then it may come to its end
            stage = run.kill(draw.uniform(0, 0.8 * length), draw.randrange(world))
            if stage is None:
                break
            stages[stage] += 1
        else:
            run.finish()
        assert not list(run.run.glob("checkpoints/.*"))
        found = run.end()
        assert found[0] == rows, _difference(found[0], rows)
        assert found[1].keys() == weights.keys()
        assert all(torch.equal(found[1][name], weights[name]) for name in weights)
        assert found[2] == tested
        shutil.rmtree(run.folder)
    with capsys.disabled():
        print(f"\n{sum(stages.values())} kills of {runs} runs of {world} process(es): {dict(stages)}")


def _difference(found: list[dict[str, str]] | None, wanted: list[dict[str, str]]) -> str:
    """The cells that differ."""
    pairs = list(zip(found or [], wanted, strict=False))
    cells = [f"{name} of row {n}: {a.get(name)} and {b[name]}" for n, (a, b) in enumerate(pairs) for name in b
             if a.get(name) != b[name]]  # fmt: skip
    return f"{len(found or [])} and {len(wanted)} rows; {'; '.join(cells[:9])}"
