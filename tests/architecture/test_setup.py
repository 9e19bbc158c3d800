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


def test_fast_tests_run_side_by_side_file_by_file(clone: Path) -> None:
    """What is made once for a file would be made by every process that has a part of the file."""
    venv = clone / ".venv"
    venv.mkdir()
    for stamp in (".usable", ".ready-test"):
        (venv / stamp).touch()
    command = make("--dry-run", "test", "ARGS=--numprocesses 0", folder=clone).stdout
    assert '-m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile' in command
    assert command.rstrip().endswith("--numprocesses 0"), "ARGS come last, so that they can undo it"
    assert "--numprocesses" not in make("--dry-run", "test-slow", folder=clone).stdout


def test_ci_checks_and_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run must be executable"
    assert "set -euo pipefail" in script
    assert "make check" in script
    assert "make test" in script


class Machine:
    """A clone with a stand-in for the virtual environment's Python, which writes down what pip is asked for."""

    def __init__(self, clone: Path) -> None:
        self.clone, self.log, self.path = clone, clone / "asked", clone / "path"
        python = clone / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        self.path.mkdir()
        (clone / ".venv" / ".usable").touch()
        script = f'#!/bin/sh\necho "$@" >> {self.log}\ncase "$*" in *--index-url*) exit ${{INDEX_FAILS:-0}};; esac\n'
        python.write_text(script)
        python.chmod(0o755)

    def program(self, name: str, script: str) -> None:
        file = self.path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    def set_up(self, *arguments: str, index_fails: bool = False) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        (self.clone / ".venv" / ".ready-run").unlink(missing_ok=True)
        path = f"{self.path}:{os.environ['PATH']}"
        return subprocess.run(
            ["make", "--no-print-directory", ".venv/.ready-run", *arguments],
            cwd=self.clone, capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": path, "INDEX_FAILS": str(int(index_fails))},
        )  # fmt: skip

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def machine(clone: Path) -> Machine:
    made = Machine(clone)
    made.program("uname", "echo Linux")
    made.program("nvidia-smi", "exit 9")
    return made


CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu torch"


def test_without_a_gpu_the_cpu_build_comes_first(machine: Machine) -> None:
    """With the pins, and before the package, whose requirement it then meets."""
    assert machine.set_up().returncode == 0
    back_end, torch, package = machine.asked()
    assert back_end.endswith("hatchling editables")
    assert torch.endswith(CPU_INDEX)
    assert "--constraint constraints.txt" in torch
    assert "--no-deps" in torch
    assert package.endswith("--editable .")
    assert "--index-url" not in package


def test_an_index_that_cannot_be_asked_does_not_end_the_set_up(machine: Machine) -> None:
    done = machine.set_up(index_fails=True)
    assert done.returncode == 0
    assert "taking the one that pip finds otherwise" in done.stdout
    assert machine.asked()[-1].endswith("--editable .")


def test_with_a_gpu_or_on_another_system_it_is_pips_own(machine: Machine) -> None:
    machine.program("nvidia-smi", 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"')
    assert machine.set_up().returncode == 0
    assert not [line for line in machine.asked() if "--index-url" in line]
    machine.program("nvidia-smi", "exit 9")
    machine.program("uname", "echo Darwin")
    assert machine.set_up().returncode == 0
    assert not [line for line in machine.asked() if "--index-url" in line]


def test_the_build_of_torch_can_be_chosen(machine: Machine) -> None:
    assert machine.set_up("TORCH=index").returncode == 0
    assert not [line for line in machine.asked() if "--index-url" in line]
    machine.program("nvidia-smi", 'echo "GPU 0: NVIDIA H100 (UUID: GPU-1)"')
    assert machine.set_up("TORCH=cpu").returncode == 0
    assert machine.asked()[1].endswith(CPU_INDEX)
    refused = machine.set_up("TORCH=rocm")
    assert refused.returncode != 0
    assert "TORCH must be cpu, index or auto: got rocm" in refused.stderr
    assert not (machine.clone / ".venv" / ".ready-run").exists()
