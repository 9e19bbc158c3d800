"""A run that ended before its schedule did says so, on the page and at the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import edit, make_run
from shown_text import screen, words

from moekit.report import results_markdown, write_report

CUT = {"by": "clock", "steps": 40, "minutes": 2.0, "max_steps": 250, "max_minutes": 2.0, "done": 0.16}
RATES = {"learning_rate": 0.98, "last_learning_rate": 0.05}


def run_that_ended(folder: Path, **ending: Any) -> Path:
    run = make_run(folder, steps=40)
    edit(run, "summary.json", ending=ending)
    (run / "checkpoints").mkdir()
    return run


@pytest.mark.parametrize(
    ("ending", "lines", "more"),
    [
        (
            {**CUT, **RATES},
            ["Cut by its clock after 40 of 250 steps, 16 % of the schedule",
             "The learning rate had fallen only to 98 % of its peak; it ends at 5 %"],
            "--resume --train.max_minutes 14",  # 2 minutes * 250 / 40, and a tenth
        ),
        (
            {**CUT, **RATES, "learning_rate": 0.999},
            ["Cut by its clock after 40 of 250 steps, 16 % of the schedule",
             "The learning rate had not fallen from its peak; it ends at 5 %"],
            "--resume --train.max_minutes 14",
        ),
        (
            {**CUT, "by": "interrupted", "signal": "SIGTERM", "learning_rate": 0.5, "last_learning_rate": 0.05,
             "rising": True},
            ["Interrupted by SIGTERM after 40 of 250 steps, 16 % of the schedule",
             "The learning rate was still rising, at 50 % of its peak"],
            "--resume",
        ),
        (
            {**CUT, "by": "stopped", "learning_rate": 1.0, "last_learning_rate": 1.0},
            ["Stopped by an error or a callback after 40 of 250 steps, 16 % of the schedule"],
            "--resume",
        ),
    ],
)  # fmt: skip
def test_a_cut_run_says_so_and_how_it_goes_on(
    ending: dict[str, Any], lines: list[str], more: str, tmp_path: Path
) -> None:
    run = run_that_ended(tmp_path / "r", **ending)
    shown = screen(run).splitlines()
    assert [line.removeprefix("! ") for line in shown if line.startswith("! ")][: len(lines)] == lines
    command = f"moekit run zcode_m3 --out 'runs/a name' {more}"
    assert f"go on       {command}" in shown
    assert len(shown) <= 24
    assert max(len(line) for line in shown if "moekit" not in line) <= 80
    page, text = words(write_report(run).read_text(encoding="utf-8")), results_markdown(run)
    head = page[: page.index("Translation quality")]
    assert lines[0].split(" after ")[0] in head
    assert lines[-1] in head
    assert f"```sh\n{command}\n```" in text


@pytest.mark.parametrize("ending", [{**CUT, "by": "steps", "done": 1.0}, {**CUT, "by": "minutes"}, {"by": 3}, {}])
def test_a_whole_run_and_one_that_does_not_say_show_nothing(ending: dict[str, Any], tmp_path: Path) -> None:
    run = run_that_ended(tmp_path / "r", **ending)
    assert "go on" not in screen(run)
    assert "of the schedule" not in words(write_report(run).read_text(encoding="utf-8"))


def test_a_run_of_another_program_goes_on_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_that_ended(tmp_path / "r", **CUT)
    monkeypatch.chdir(tmp_path)
    edit(run, "environment.json", command=["python", "-m", "moekit", "prune", "runs/x", "--out", "r"])
    assert "moekit run zcode_m3 --config r/config.yaml --out r --resume --train.max_minutes 14" in screen(Path("r"))
