"""Commands that are printed start moekit in the shell that they are printed in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekit import shell


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an environment whose script, an echo, is not on the PATH."""
    folder = tmp_path / "my work"
    scripts = folder / ".venv" / "bin"
    script(scripts)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(shell.sysconfig, "get_path", lambda name: {"scripts": str(scripts)}[name])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def script(folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / "moekit"
    file.write_text('#!/bin/sh\necho "$0" "$#" "$@"\n')
    file.chmod(0o755)
    return file


def typed(line: str) -> list[str]:
    """What the script says when a shell in the working folder is given the line."""
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout.split(" ")


@pytest.mark.parametrize(
    ("path", "folder", "shown"),
    [
        ("PATH", ".", ".venv/bin/moekit"),
        ("OWN:PATH", ".", "moekit"),
        ("PATH:OWN", ".", "moekit"),
        ("OTHER:OWN:PATH", ".", ".venv/bin/moekit"),
        ("PATH", ".venv/bin", "./moekit"),
        ("PATH", "/usr", "~/'my work/.venv/bin/moekit'"),
    ],
)
def test_a_command_starts_the_script_of_the_interpreter(
    path: str, folder: str, shown: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = work / ".venv" / "bin"
    other = script(tmp_path / "other").parent
    for name, place in (("OWN", own), ("OTHER", other), ("PATH", os.environ["PATH"])):
        path = path.replace(name, str(place))
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(folder)
    assert shell.program() == shown
    said = " ".join(typed(shell.command_line("report", "a folder", "it's")))
    assert said.endswith("moekit 3 report a folder it's\n")
    assert "other" not in said


def test_a_link_to_the_script_on_the_path_is_the_script(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "moekit").symlink_to(work / ".venv" / "bin" / "moekit")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    assert shell.program() == "moekit"


def test_without_a_script_the_interpreter_starts_the_package(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / ".venv" / "bin" / "moekit").unlink()
    python = work / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    assert shell.command_line("test", "x") == "env/bin/python -m moekit test x"
    monkeypatch.setenv("PATH", f"{python.parent}:/bin")
    assert shell.command_line("test", "x") == "python -m moekit test x"


@pytest.mark.parametrize(
    ("recorded", "shown"),
    [
        (["moekit", "run", "switch", "--out", "a b"], ".venv/bin/moekit run switch --out 'a b'"),
        (["python", "-m", "moekit", "test", "runs/x"], ".venv/bin/moekit test runs/x"),
        (["python", "-m", "moekit.recipes.switch"], ".venv/bin/moekit run switch"),
        (["python", "-m", "moekit.recipes.switch", "--seed", "1"], ".venv/bin/moekit run switch --seed 1"),
        (["python", "-m", "moekit.recipes.switch", "fit", "--out=~/r"], '.venv/bin/moekit fit switch --out="$HOME"/r'),
        (["python", "train.py", "~/my data"], "python train.py ~/'my data'"),
        ([], ""),
    ],
)
def test_a_recorded_command_is_shown_as_it_is_typed_today(recorded: list[str], shown: str, work: Path) -> None:
    assert shell.typed_again(recorded) == shown


def test_a_recipes_arguments_name_it_behind_the_command(work: Path) -> None:
    assert shell.recipe_command("switch", ["fit", "--out", "x"]) == ".venv/bin/moekit fit switch --out x"
    assert shell.recipe_command("switch", ["--resume"]) == ".venv/bin/moekit run switch --resume"
