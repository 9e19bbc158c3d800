"""The benchmark of expert parallelism, at toy size: layers, overlap and training steps run and are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "expert_parallel.py"


def run(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the program writes, and what it prints."""
    written = folder / "found.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(written), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(written.read_text())
    assert found["environment"]["packages"]["torch"]
    return found, done.stdout


@pytest.mark.slow  # three programs of two processes each
def test_at_toy_size(tmp_path: Path) -> None:
    found, _ = run(tmp_path, "--loads", "balanced")
    assert [(row["load"], row["k"]) for row in found["layer"]] == [("balanced", 1), ("balanced", 2)]
    found, printed = run(tmp_path, "--overlap")
    assert all(row["overlaps"] > 0 for row in found["overlap"])
    assert "ratio" in printed
    found, printed = run(tmp_path, "--trainer")
    rows = {row["arm"]: row for row in found["trainer"]}
    assert len(rows) == 8
    assert rows["dense twin, DDP"]["ratio"] == 1.0
    for name, row in rows.items():
        assert name in printed
        assert row["compute"] + row["copying"] + row["waiting"] == pytest.approx(row["wall"], rel=0.5), row
