"""Set-up by the Makefile, as far as it can be tested without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_alone_it_lists_its_commands() -> None:
    shown = make()
    assert shown.returncode == 0
    for command in ("run", "test", "check", "test-slow", "docs", "bench"):
        assert f"  make {command} " in shown.stdout


def test_an_old_python_is_refused(clone: Path) -> None:
    old = clone / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    refused = make(".venv/.usable", f"PYTHON={old}", folder=clone)
    assert refused.returncode != 0
    assert "needs Python 3.11 or newer" in refused.stderr
    assert "Python 3.9.2" in refused.stderr
    assert not (clone / ".venv").exists()


def test_set_up_happens_once_and_again_when_pins_change(clone: Path) -> None:
    venv = clone / ".venv"
    venv.mkdir()
    for stamp in (".usable", ".ready-run", ".ready-test"):
        (venv / stamp).touch()
    assert "install" not in make("--dry-run", "run", folder=clone).stdout
    assert "install" not in make("--dry-run", "test", folder=clone).stdout

    pins = clone / "constraints.txt"
    later = (venv / ".ready-test").stat().st_mtime + 10
    os.utime(pins, (later, later))
    assert "install" in make("--dry-run", "run", folder=clone).stdout
    assert '".[test]"' in make("--dry-run", "test", folder=clone).stdout


def test_ci_checks_and_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run must be executable"
    assert "set -euo pipefail" in script
    assert "make check" in script
    assert "make test" in script
