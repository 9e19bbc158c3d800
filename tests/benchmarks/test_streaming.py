"""Text through the whole path, and the memory that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "streaming.py"


def measured(*options: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow  # ten minutes on two shared cores
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is what /proc says")
def test_a_gigabyte_in_700_mebibytes(tmp_path: Path) -> None:
    code, found = measured("--megabytes", "1000", "--files", "24", "--bound", "700", "--folder", str(tmp_path))
    assert code == 0, found
    assert found["megabytes"] > 1000  # type: ignore[operator]
    assert found["same_batches_again"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is what /proc says")
def test_the_bound_is_held_to(tmp_path: Path) -> None:
    code, found = measured("--megabytes", "5", "--bound", "100", "--folder", str(tmp_path))
    assert code == 1
    assert found["same_batches_again"]
