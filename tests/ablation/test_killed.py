"""A table of real runs, killed in its middle and stopped by Ctrl-C: going on gives the result of one never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_tables import TABLE, changed, write_table

from moekit.ablation.processes import RunRecord, last_step
from moekit.ablation.result import comparable, read_result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "many": {},
    "few": {"settings": {"model.num_experts": 2}},
    "roomy": {"of": "many", "settings": {"model.eval_capacity_factor": 4.0}},
    "half": {"of": "many", "prune": {"keep": "50%", "by": "random"}},
}


def start(folder: Path, table: Path, runs: str) -> subprocess.Popen[bytes]:
    options = ["--runs", runs, "--out", f"{runs}-result", "--jobs", "2"]
    command = [sys.executable, "-m", "moekit", "ablate", str(table), *options]
    with (folder / f"{runs}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def until_a_run_is_in_its_middle(runs: Path, process: subprocess.Popen[bytes], steps: int, done: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        folders = [path for path in runs.glob("moe_lm-*/") if RunRecord.of(path).state == "unfinished"]
        finished = [path for path in runs.glob("moe_lm-*/") if RunRecord.of(path).state == "done"]
        if len(finished) >= done and any(3 < last_step(path) < steps - 5 for path in folders):
            return
        time.sleep(0.05)
    raise AssertionError("no run was met in its middle")


def test_a_killed_table_goes_on_to_the_same_result(tmp_path: Path) -> None:
    steps = 60
    settings = {
        "model": {"dim": 16, "heads": 2, "hidden_dim": 32, "layers": 2},
        "train": {"max_steps": steps, "warmup_steps": 4, "log_every": 1, "validate_every": 0, "checkpoint_steps": 2},
        "data": {"babel_sentences": 300, "vocab_size": 400, "max_length": 40, "cache": str(tmp_path / "cache")},
        "tasks.causal_lm.tokens": 128,
        "evaluate": {"max_sentences": 4, "valid_sentences": 4, "samples": 0},
    }
    within = TABLE["claims"][0] | {"id": "room", "kind": "within checkpoint", "arm": "roomy", "against": "many"}
    table = changed(
        settings=settings,
        arms=ARMS,
        seeds=[1, 2],
        learning_rates=None,
        claims=[TABLE["claims"][0], within],
        control=TABLE["control"] | {"arm": "half", "metric": "diverged"},
    )
    path = write_table(tmp_path, table)
    stopped = start(tmp_path, path, "stopped")
    until_a_run_is_in_its_middle(tmp_path / "stopped", stopped, steps, done=0)
    stopped.kill()  # its runs do not notice, and write on
    stopped.wait()
    stopped = start(tmp_path, path, "stopped")
    until_a_run_is_in_its_middle(tmp_path / "stopped", stopped, steps, done=2)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(timeout=200) == 130
    said = (tmp_path / "stopped.log").read_text()
    assert "What has been done is kept. To go on:" in said
    assert f"{path} --jobs 2 --runs stopped --out stopped-result" in said
    assert "Traceback" not in said
    for runs in ("stopped", "whole"):
        process = start(tmp_path, path, runs)
        assert process.wait(timeout=560) == 0, (tmp_path / f"{runs}.log").read_text()[-3000:]
    found, whole = (read_result(tmp_path / f"{runs}-result" / "table.json") for runs in ("stopped", "whole"))
    assert comparable(found) == comparable(whole)
    assert {arm: [run["state"] for run in got["runs"].values()] for arm, got in found["arms"].items()} == {
        arm: ["done", "done"] for arm in ARMS
    }
    parameters = {arm: got["costs"]["parameters"] for arm, got in found["arms"].items()}
    assert parameters["half"] < parameters["many"] == parameters["roomy"]
