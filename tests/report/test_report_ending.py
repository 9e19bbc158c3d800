"""A run that ended before its schedule did says so, on the page and at the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_runs import edit, make_run
from shown_text import screen, words

from moekit.report import results_markdown, write_report
from moekit.report.health import findings
from moekit.report.reading import read_run

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


def test_options_that_the_command_gives_anew_are_given_once(tmp_path: Path) -> None:
    run = run_that_ended(tmp_path / "r", **CUT)
    for given in (["--train.max_minutes", "2"], ["--train.max_minutes=2"]):
        edit(run, "environment.json", command=["moekit", "run", "zcode_m3", *given, "--out", "r", "--resume"])
        assert "go on       moekit run zcode_m3 --out r --resume --train.max_minutes 14" in screen(run).splitlines()


def test_a_value_that_is_also_the_number_of_minutes_is_no_option(tmp_path: Path) -> None:
    run = run_that_ended(tmp_path / "r", **CUT)
    given = ["--train.max_minutes", "2", "--train.validate_every", "14", "--out", "r"]
    edit(run, "environment.json", command=["moekit", "run", "zcode_m3", *given])
    said = "go on       moekit run zcode_m3 --train.validate_every 14 --out r --resume --train.max_minutes 14"
    assert said in screen(run).splitlines()


def test_an_interrupted_run_says_how_far_it_came_and_how_it_goes_on(tmp_path: Path) -> None:
    """A signal or an error ends it before there is a summary."""
    run = make_run(tmp_path / "r", steps=40, without=("summary.json", "routing.json"))
    assert "go on" not in screen(run), "there is no checkpoint"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    with (run / "config.yaml").open("a") as file:
        file.write("  max_steps: 250\n")
    steps, rate = read_run(run).steps, read_run(run).learning_rate
    assert steps is not None
    assert rate is not None
    share = round(100 * rate.value[-1] / rate.value.max())
    lines = [f"Not finished after {steps} of 250 steps", f"The learning rate was at {share} % of its highest"]
    shown = screen(run).splitlines()
    assert [line.removeprefix("! ") for line in shown if line.startswith("! ")][:2] == lines
    assert "go on       moekit run zcode_m3 --out 'runs/a name' --resume" in shown
    page = words(write_report(run).read_text(encoding="utf-8"))
    assert f"{lines[0]}. {lines[1]}." in page[: page.index("Translation quality")]


def test_a_run_that_went_on_after_its_test_says_of_when_the_scores_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=40)
    assert "Trained on" not in screen(run)
    edit(run, "summary.json", steps=20)
    last = read_run(run).trained_since
    assert last is not None
    assert f"! Trained on to step {last} since its test, which was after 20 steps" in screen(run).splitlines()
    page = words(write_report(run).read_text(encoding="utf-8"))
    assert "which was after 20 steps: scores are of then." in page[: page.index("Translation quality")]


def test_a_run_that_stopped_by_itself_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=40, without=("summary.json", "routing.json"))
    (run / "stopped.json").write_text('{"step": 41, "why": "step 41 is not finite: <b>the gradient norm</b>."}')
    said = "Training stopped: step 41 is not finite: <b>the gradient norm</b>."
    assert f"! {said}" in screen(run).splitlines()
    page = write_report(run).read_text(encoding="utf-8")
    assert words(page).index("Training stopped: step 41") < words(page).index("This run is not finished")
    assert "<b>the gradient" not in page
    assert "&lt;b&gt;the gradient norm" in results_markdown(run)
    for wrong in ("[]", "{", '{"why": 3}', ""):
        (run / "stopped.json").write_text(wrong)
        assert "Training stopped" not in screen(run)
        assert "stopped.json" not in words(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("remarks", [0, 1, 2, 5])
def test_the_terminal_says_how_many_findings_it_leaves_out(remarks: int, tmp_path: Path) -> None:
    """Two and one more are shown; of more than that their number."""
    run = make_run(tmp_path / "r", steps=40)
    edit(run, "routing.json", layers=[{"name": "decoder.1", "load": [1.0, *[0.0] * 7], "dead_experts": 7}])
    edit(run, "summary.json", held_out={"remarks": [f"remark {i}." for i in range(remarks)]})
    bad = [finding.text for finding in findings(read_run(run)) if not finding.good]
    assert len(bad) >= remarks + 2
    more = len(bad) - 2
    left = [f"and {more} more such findings, at the top of the report"] if more > 1 else bad[2:]
    shown = [line.removeprefix("! ") for line in screen(run).splitlines() if line.startswith("! ")]
    assert shown == [*bad[:2], *left]
    page = words(write_report(run).read_text(encoding="utf-8"))
    assert all(finding in page for finding in bad)


def test_what_is_worse_than_blind_guessing_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=40)
    assert not any("blind" in finding.text for finding in findings(read_run(run)))
    edit(run, "summary.json", data={"vocab_size": 1600}, perplexity={"translation": 1600.5, "denoising": 1599.0})
    told = [finding for finding in findings(read_run(run)) if "blind" in finding.text]
    assert [(f.good, f.text) for f in told] == [(False, "Translation: perplexity above 1,600, that of blind guessing.")]
