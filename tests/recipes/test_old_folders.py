"""Run folders, checkpoints and exported folders that earlier code wrote still open, and say what they said.

`old_folders/folders.tar.xz` was written by `old_folders/make_folders.py`, and is not to be made again for a change that
reads it differently. Commands are those of the documentation, ``python -m moekit.recipes.NAME`` and so on.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from old_folders import using
from recording import differences, machine, read_folder, shown

# A command is run here as a program, although other tests may have imported its module.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
HERE = Path(__file__).with_name("old_folders")
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
TOLERANCE = 0.001
"""Of losses on another machine: weights are given, so that only the order of sums differs."""
AFTER_TRAINING = 0.05
"""Of a few steps: dropout draws other numbers now."""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, where the test runs."""
    with tarfile.open(HERE / "folders.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(what: str, found: Any, tolerance: float = TOLERANCE) -> None:
    recorded = EXPECTED[what]
    if not isinstance(recorded, Mapping):
        recorded, found = {what: recorded}, {what: found}
    lines = differences(recorded, found, exact=EXPECTED["machine"] == machine(), tolerance=tolerance)
    assert not lines, f"{what}: {shown(lines)}"


@pytest.mark.parametrize("name", using.LANGUAGES)
def test_a_run_is_tested_inspected_and_reported(name: str) -> None:
    folder = Path(name)
    before = read_folder(folder)
    using.recipe(name, "test", "--out", name)
    check(f"{name} test", read_folder(folder))
    assert read_folder(folder)["metrics"] == before["metrics"]
    check(f"{name} inspect", using.inspected(folder))
    text = using.command("moekit.report", name, "--markdown")
    written = re.sub(
        r"## What experts like\n.*?(?=\n## )\n", "", text, flags=re.DOTALL
    ).splitlines()  # not in the records
    later = [line for line in written if not line.startswith("| Work |")]  # a tile that the records lack, and a remark
    check(f"{name} markdown", [re.sub(r", \S+ % by always the most frequent answer", "", line) for line in later])
    (folder / "report.html").unlink()
    using.command("moekit.report", name)
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", using.WRITE)
def test_a_run_writes(name: str) -> None:
    check(f"{name} generate", using.generated(name, Path(name)))


@pytest.mark.parametrize("name", using.LANGUAGES)
def test_a_run_is_started_from(name: str) -> None:
    check(f"{name} finetune", read_folder(using.fine_tuned(name, Path(name), Path(f"{name}-tuned"))), AFTER_TRAINING)


@pytest.mark.parametrize("name", using.LANGUAGES)
def test_a_run_goes_on(name: str) -> None:
    check(f"{name} resume", read_folder(using.resumed(name, Path(name))), AFTER_TRAINING)


@pytest.mark.parametrize("name", using.EXPORTED)
def test_an_exported_folder_comes_back(name: str) -> None:
    using.command("moekit.surgery", "import", f"{name}-exported", "--like", name, "--out", "back")
    before, after = using.weights(Path(name), "best.ckpt"), using.weights(Path("back"), "last.ckpt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_checkpoints_of_several_processes_open() -> None:
    paths = sorted(Path(using.SHARDED).iterdir())
    assert len(paths) == 3
    for path in paths:
        check(f"{path} inspect", using.inspected(path))
