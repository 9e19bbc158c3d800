"""kill -9 at random instants of a whole run, from its first moment to its test: resumed, it equals one never killed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import re
import socket
import time
from collections import Counter
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
KILLS = 10  # of each layout
CLOCK = re.compile(r"second|minute|memory|bytes")


class Killed:
    """A run in a folder, which is started again and again."""

    def __init__(self, folder: Path, cache: Path, world: int) -> None:
        self.run, self.world = folder / "run", world
        self.folder = folder
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
        stage = self.stage()
        for process in processes:
            process.join(timeout=60)  # the others notice
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"a process outlives a killed one by a minute:\n{self.logs()}")
        return stage

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


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_anywhere_equals_one_that_is_not(
    world: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Killed(tmp_path / "whole", tmp_path / "cache", world)
    Killed(tmp_path / "first", tmp_path / "cache", world).finish()  # which fills the cache, and imports everything
    began = time.monotonic()
    whole.finish()
    length = time.monotonic() - began
    rows, weights, tested = whole.end()
    assert rows is not None
    assert [row["step"] for row in rows][:24] == [str(step) for step in range(24)]
    draw = random.Random(world)
    stages: Counter[str] = Counter()
    runs = 0
    while sum(stages.values()) < KILLS:
        runs += 1
        run = Killed(tmp_path / f"run{runs}", tmp_path / "cache", world)
        for _ in range(4):  # and then it may come to its end
            stage = run.kill(draw.uniform(0, 0.8 * length), draw.randrange(world))
            if stage is None:
                break
            stages[stage] += 1
        else:
            run.finish()
        assert not list(run.run.glob("checkpoints/.*"))
        found = run.end()
        assert found[0] == rows
        assert found[1].keys() == weights.keys()
        assert all(torch.equal(found[1][name], weights[name]) for name in weights)
        assert found[2] == tested
    with capsys.disabled():
        print(f"\n{sum(stages.values())} kills of {runs} runs of {world} process(es): {dict(stages)}")
