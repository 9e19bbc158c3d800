"""Running a table: what is made once, what goes on, what fails, and what comes of it; runs follow a formula."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from small_tables import NOISE, TABLE, began, changed, fake, formula, plainly, run, write_table

from moekit.ablation.pages import drawing, markdown
from moekit.ablation.plan import Job, Plan
from moekit.ablation.processes import RunRecord, last_step, measured_minutes
from moekit.ablation.result import comparable, read_result
from moekit.ablation.session import Estimate, list_tables, results_folder
from moekit.ablation.table import read_table
from moekit.ablation.view import Progress, spoken_minutes
from moekit.cli.program import main
from moekit.errors import UserError
from moekit.lock import held
from moekit.terminal import Terminal


def test_a_table_from_file_to_verdict(tmp_path: Path) -> None:
    path, runs = write_table(tmp_path), tmp_path / "runs"
    found, said = run(path, runs)
    assert found is not None
    # Three arms at two rates and two seeds, then three at five; nothing is made twice.
    assert began(runs) == 3 * 2 * 2 + 3 * 5
    assert {arm: got["chosen"] for arm, got in found["learning_rates"]["arms"].items()} == {
        "many": 0.004, "few": 0.004, "again": 0.004,
    }  # fmt: skip
    claim = found["claims"][0]
    assert claim["verdict"] == "reproduced"
    assert claim["difference"] == pytest.approx(0.1 * 2**0.5 - 0.1 * 8**0.5)  # by the formula, noise being paired
    assert claim["interval"] == pytest.approx([claim["difference"]] * 2)
    assert (claim["pairs"], claim["failed"], claim["not_matched"]) == (5, 0, [])
    assert found["control"]["verdict"] == "reproduced"
    assert found["arms"]["many"]["runs"]["2"]["metrics"]["test.causal_lm.loss"] == pytest.approx(
        3 - 0.1 * 8**0.5 + NOISE[2]
    )
    assert found["arms"]["many"]["costs"] == {"work": 1e9, "parameters": 100, "active_parameters": 50, "tokens": 1000}
    assert found["made"]["minutes"] > 0
    assert "reproduced" in said
    # The files, of which the page and the drawing are made of the JSON alone.
    stored = read_result(tmp_path / "results" / "table.json")
    assert comparable(stored) == comparable(found)
    page = (tmp_path / "results" / "table.md").read_text()
    assert page == markdown(stored)
    for words in (
        "many-better: reproduced",
        "More experts are better",
        "The paper: 0.4",
        "| few | two experts |",
        "0.004",
    ):
        assert words in page
    picture = (tmp_path / "results" / "table.svg").read_bytes()
    assert picture == drawing(stored) == drawing(json.loads(json.dumps(stored)))


def test_a_second_time_nothing_is_run_and_the_numbers_are_the_same(tmp_path: Path) -> None:
    path, runs = write_table(tmp_path), tmp_path / "runs"
    first, _ = run(path, runs)
    before = began(runs)
    again, _ = run(path, runs)
    assert began(runs) == before
    elsewhere, _ = run(path, tmp_path / "other runs")
    assert first is not None
    assert again is not None
    assert elsewhere is not None
    assert comparable(first) == comparable(again) == comparable(elsewhere)


def test_tables_share_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(write_table(tmp_path), runs)
    before = began(runs)
    other = changed(title="The same arms, another question")
    other["claims"][0] |= {"id": "other", "kind": "no difference", "smallest": 0.5}
    other["claims"][0].pop("direction")
    found, said = run(write_table(tmp_path / "b", other), runs)
    assert began(runs) == before
    assert "15 of 15 done" in said
    assert found is not None
    assert found["claims"][0]["verdict"] == "reproduced"


class StopError(Exception):
    """Ends a session as a fault would."""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, pytest.param(StopError, marks=pytest.mark.slow)])
def test_what_was_stopped_goes_on_to_the_same_result(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the choice of rates, and in the midst of runs, whose own checkpoints they go on from."""
    path, runs = write_table(tmp_path), tmp_path / "runs"
    slow = fake(lambda job: formula(job) | {"steps": 15})
    whole, _ = run(path, tmp_path / "whole")  # a run's steps change nothing of what it comes to
    step = Progress.step

    def done() -> list[str]:
        return [folder.name for folder in runs.glob("*-*/") if RunRecord.of(folder).state == "done"]

    for enough in (3, 14):

        def watched(self: Progress, running: Any, enough: int = enough) -> None:
            step(self, running)
            if len(done()) >= enough and any(3 < last < 12 for _, last in running.values()):
                raise stop

        monkeypatch.setattr(Progress, "step", watched)
        with pytest.raises(stop):
            run(path, runs, slow)
    monkeypatch.setattr(Progress, "step", step)
    untouched = {name: (runs / name / "began").read_text() for name in done()}
    stopped = {
        path.parent: path.read_text() for path in runs.glob("*-*/checkpoint") if path.parent.name not in untouched
    }
    assert any(int(step) > 0 for step in stopped.values())
    found, said = run(path, runs, slow)
    assert found is not None
    assert whole is not None
    assert comparable(found) == comparable(whole)
    assert "goes on" in said
    assert {folder: (folder / "began").read_text().split()[-1] for folder in stopped} == stopped
    assert {name: (runs / name / "began").read_text() for name in untouched} == untouched


def test_runs_that_end_badly_are_results(tmp_path: Path) -> None:
    """One diverges, which is final; others break, and are tried again next time; the table goes on and says so."""
    path, runs = write_table(tmp_path, changed(learning_rates=None)), tmp_path / "runs"

    def ending(job: Job) -> dict[str, Any]:
        ends = {("few", 2): "diverged", ("few", 4): "broken", ("few", 5): "killed"}
        arm, _, seed = job.label.split(",")[0], "", int(job.label.split()[-1])
        return formula(job) | {"end": ends.get((arm, seed), "done")}

    found, said = run(path, runs, fake(ending))
    assert found is not None
    claim = found["claims"][0]
    assert (claim["verdict"], claim["failed"], claim["pairs"]) == ("inconclusive", 3, 2)
    assert "3 runs diverged or failed" in claim["why"]
    states = {seed: one["state"] for seed, one in found["arms"]["few"]["runs"].items()}
    assert states == {"1": "done", "2": "diverged", "3": "done", "4": "failed", "5": "failed"}
    assert "not finite" in found["arms"]["few"]["runs"]["2"]["said"]
    assert "ZeroDivisionError" in (tmp_path / "results" / "table.md").read_text()
    assert "few, seed 2: diverged" in said
    before = began(runs)
    again, _ = run(path, runs)
    assert began(runs) == before + 2, "the broken one, and the one of which a process was killed"
    assert again is not None
    assert again["claims"][0]["failed"] == 1


@pytest.mark.parametrize(("end", "code"), [("broken", 1), ("diverged", 0), ("done", 0)])
def test_the_command_fails_where_runs_have_failed(
    end: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that diverges is a result; one that broke is not, and whoever calls the command should learn of it."""
    path = write_table(tmp_path)
    few = fake(
        lambda job: formula(job) | {"end": end if job.label.startswith(("few, seed 2,", "few, seed 3,")) else "done"}
    )
    found, _ = run(path, tmp_path / "runs", few)
    monkeypatch.setattr("moekit.ablation.session.run_table", lambda *_, **__: found)
    assert main(["ablate", str(path)]) == code
    said = capsys.readouterr().err
    assert ("2 runs of the table failed, such as few, seed 2: ZeroDivisionError" in said) == (code == 1), said


def test_divergence_can_be_what_is_measured(tmp_path: Path) -> None:
    diverging = TABLE["claims"][0] | {"metric": "diverged", "smallest": 0.3}
    path = write_table(tmp_path, changed(learning_rates=None, claims=[diverging]))
    found, _ = run(path, tmp_path / "runs", fake(lambda job: formula(job) | {
        "end": "diverged" if job.label.startswith("few") else "done"}))  # fmt: skip
    assert found is not None
    assert found["claims"][0]["verdict"] == "reproduced"
    assert found["claims"][0]["means"] == {"many": 0.0, "few": 1.0}


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    def ending(job: Job) -> dict[str, Any]:
        return formula(job) | {"end": "diverged" if job.config.train.learning_rate == 0.004 else "done"}

    found, _ = run(write_table(tmp_path), tmp_path / "runs", fake(ending))
    assert found is not None
    many = found["learning_rates"]["arms"]["many"]
    assert (many["chosen"], many["on_edge"], many["tried"]["0.004"]) == (0.001, True, [None, None])
    with pytest.raises(UserError, match="every learning rate of the grid diverged or failed for the arm many"):
        run(write_table(tmp_path), tmp_path / "b", fake(lambda job: formula(job) | {"end": "diverged"}))


def test_a_run_that_refuses_its_settings_ends_the_session(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the run many, seed 101, rate 0\.001 was refused: model\.heads must divide"):
        run(write_table(tmp_path), tmp_path / "runs", fake(lambda job: formula(job) | {"end": "refused"}), at_once=1)


def test_two_sessions_do_not_share_a_folder(tmp_path: Path) -> None:
    with held(tmp_path / "runs"), pytest.raises(UserError, match="made by another ablate: wait until it ends"):
        run(write_table(tmp_path), tmp_path / "runs")


def test_a_metric_that_no_run_has_is_named(tmp_path: Path) -> None:
    bad = TABLE["claims"][0] | {"metric": "test.causal_lm.bleu"}
    with pytest.raises(UserError, match=r"has no number 'test.causal_lm.bleu'. It has test.causal_lm.loss"):
        run(write_table(tmp_path, changed(claims=[bad])), tmp_path / "runs")


def test_a_metric_that_no_run_has_is_noticed_at_the_first(tmp_path: Path) -> None:
    """And not once all are made; what was made stays."""
    wrong = {"claims": [TABLE["claims"][0] | {"metric": "test.causal_lm.los"}], "learning_rates": None}
    path, runs = write_table(tmp_path, changed(**wrong)), tmp_path / "runs"
    with pytest.raises(
        UserError, match=r"table\.yaml: a metric that the table asks for is not there: .*'test\.causal_lm\.los'"
    ):
        run(path, runs, at_once=1)
    assert began(runs) == 1
    rates = TABLE["learning_rates"] | {"metric": "loss.none"}
    path, runs = write_table(tmp_path, changed(learning_rates=rates)), tmp_path / "others"
    with pytest.raises(UserError, match=r"a metric that the table asks for is not there: .*'loss\.none'"):
        run(path, runs, at_once=1)
    assert began(runs) == 1


def test_parts_of_a_table_make_no_result(tmp_path: Path) -> None:
    path, runs = write_table(tmp_path), tmp_path / "runs"
    found, said = run(path, runs, only=["many"], seeds=[1, 2])
    assert found is None
    assert began(runs) == 4 + 2
    assert not list((tmp_path / "results").glob("*.*"))
    assert "no result yet" in said
    found, _ = run(path, runs)
    assert found is not None
    assert began(runs) == 3 * 4 + 3 * 5
    for options, words in (({"seeds": [9]}, "9 is none of 1, 2"), ({"only": ["man"]}, "Did you mean 'many'")):
        with pytest.raises(UserError, match=words):
            run(path, runs, **options)


def test_a_control_that_does_not_hold_spoils_the_table(tmp_path: Path) -> None:
    def seeds_matter(job: Job) -> dict[str, Any]:
        found = formula(job)
        return found | {"loss": found["loss"] + (0.5 if job.config.train.seed > 1000 else 0)}

    found, _ = run(write_table(tmp_path), tmp_path / "runs", fake(seeds_matter))
    assert found is not None
    assert found["claims"][0]["verdict"] == "inconclusive"
    assert "the negative control does not hold" in found["claims"][0]["why"]


def test_arms_that_are_equal_do_not_differ(tmp_path: Path) -> None:
    equal = TABLE["claims"][0] | {"kind": "no difference", "smallest": 0.01}
    equal.pop("direction")
    arms = {"many": {}, "few": {"settings": {"model.num_experts": 8}}, "again": {"seed_offset": 1000}}
    found, _ = run(write_table(tmp_path, changed(arms=arms, claims=[equal])), tmp_path / "runs")
    assert found is not None
    claim = found["claims"][0]
    assert (claim["verdict"], claim["difference"], claim["interval"]) == ("reproduced", 0.0, [0.0, 0.0])


def test_spread_over_seeds_is_compared(tmp_path: Path) -> None:
    """Distances from the median, by hand: 0.2 for two of five seeds of the one arm, 0.02 for the same of the other."""
    scatter = {1: 0.2, 3: -0.2}

    def ends(job: Job) -> dict[str, Any]:
        width = 1.0 if job.config.model.num_experts == 2 else 0.1
        return formula(job) | {"loss": 2.0 + width * scatter.get(job.config.train.seed % 1000, 0.0)}

    claim = TABLE["claims"][0] | {"kind": "spread", "smallest": 0.01}
    control = TABLE["control"] | {"metric": "routing.load_cv", "smallest": 0.5}
    found, _ = run(
        write_table(tmp_path, changed(claims=[claim], control=control, learning_rates=None)),
        tmp_path / "runs",
        fake(ends),
    )
    assert found is not None
    claim = found["claims"][0]
    assert claim["means"] == pytest.approx({"many": 0.008, "few": 0.08})
    assert claim["difference"] == pytest.approx(-0.072)
    assert claim["verdict"] == "direction only"
    page = (tmp_path / "results" / "table.md").read_text()
    assert "distance of `test.causal_lm.loss` from its median over seeds of many minus few, lower by more than" in page


def test_one_checkpoint_under_several_settings(tmp_path: Path) -> None:
    """The evaluated arm has no training of its own, and waits for that of which it is."""
    arms = {"many": {}, "few": {"of": "many", "settings": {"model.eval_capacity_factor": 2.0}}, "again": {"of": "many"}}
    claim = TABLE["claims"][0] | {"kind": "within checkpoint", "arm": "few", "against": "many", "direction": "higher"}

    def evaluated(job: Job) -> dict[str, Any]:
        if job.of is not None:
            assert RunRecord.of(job.of.folder(runs)).state == "done"
            assert job.config.train == job.of.config.train
        found = formula(job)
        return found | {"loss": found["loss"] + 0.2 * job.config.model.eval_capacity_factor}

    path, runs = write_table(tmp_path, changed(arms=arms, claims=[claim])), tmp_path / "runs"
    found, _ = run(path, runs, fake(evaluated))
    assert found is not None
    assert found["claims"][0]["difference"] == pytest.approx(0.4)
    assert found["claims"][0]["verdict"] == "reproduced"
    assert began(runs) == 4 + 5 * 3, "the grid of the one arm that trains, and three arms by five seeds"


def test_the_compute_factor_of_a_ladder(tmp_path: Path) -> None:
    """Dense loss falls by 0.1 for each doubling of work; the sparse model has that of four times its work."""
    arms = {f"dense{d}": {"settings": {"model": {"num_experts": 0, "hidden_dim": d}}} for d in (16, 32, 64, 128)}
    claim = {
        "id": "factor", "kind": "compute factor", "claim": "Sparse models save work.", "hypothesis": "They do.",
        "metric": "test.causal_lm.loss", "arm": "many", "ladder": list(arms), "smallest": 1.5,
    }  # fmt: skip

    spoilt: list[int] = []  # sizes whose training fails

    def ladder(job: Job) -> dict[str, Any]:
        dense = {16: 0, 32: 1, 64: 2, 128: 3}[job.config.model.hidden_dim]
        sparse = job.config.model.num_experts > 0
        noise = 0.1 * NOISE[job.config.train.seed % 5]
        failed = not sparse and job.config.model.hidden_dim in spoilt
        return formula(job) | {
            "loss": 3 - 0.1 * (2 if sparse else dense) + noise + failed,
            "work": 1e9 * 2 ** (0 if sparse else dense),
        }

    table = changed(arms={"many": {}} | arms, claims=[claim], control=None, no_control="a test", learning_rates=None)
    found, _ = run(write_table(tmp_path, table), tmp_path / "runs", fake(ladder))
    assert found is not None
    answer = found["claims"][0]
    assert answer["difference"] == pytest.approx(4.0, rel=0.02)
    assert answer["verdict"] == "reproduced"
    assert "over its own, above 1.5" in (tmp_path / "results" / "table.md").read_text()

    spoilt.append(128)
    again, _ = run(write_table(tmp_path, table), tmp_path / "others", fake(ladder))
    assert again is not None
    answer = again["claims"][0]
    assert answer["verdict"] == "inconclusive"
    assert answer["why"].startswith("the ladder is no measure of work, as its largest model, dense128, loses 3.7")


def test_what_a_table_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, runs = write_table(tmp_path), tmp_path / "runs"
    plan = Plan.of(read_table(path), plainly)
    before = Estimate.of(plan, runs, measured_minutes(runs))
    assert (before.runs, before.done, before.minutes, before.basis) == (27, 0, 13.5, "estimated")
    run(path, runs, only=["many"])
    half = Estimate.of(plan, runs, measured_minutes(runs))
    assert half.done >= 4
    assert half.minutes < 13.5
    run(path, runs)
    after = Estimate.of(plan, runs, measured_minutes(runs))
    assert (after.done, after.minutes) == (27, 0)


def test_the_list_of_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    path = write_table(recipes / "moe_lm" / "ablations", name="size")
    monkeypatch.setattr("moekit.ablation.table.RECIPES", recipes)
    list_tables(tmp_path / "runs", plainly, Terminal())
    said = capsys.readouterr().out
    for words in (
        "moe_lm/size",
        "Many experts against few",
        "3 arms x 5 seeds, 12 more for learning rates",
        f"runs on this machine, in {tmp_path / 'runs'}: 0 of 27 done, 14 processor minutes for the others, estimated",
        "many-better (better): More experts are better.",
        "none yet",
    ):
        assert words in said
    run(path, tmp_path / "runs", out=recipes / "moe_lm" / "results" / "ablations")
    list_tables(tmp_path / "runs", plainly, Terminal())
    said = capsys.readouterr().out
    result = f"result: 1 reproduced (seeds 1, 2, 3, 4, 5, measured on {datetime.now(UTC).date()})"
    assert result in said
    assert f"in {tmp_path / 'runs'}: 27 of 27 done, none missing" in said
    elsewhere = tmp_path / "another machine"
    with held(elsewhere):
        list_tables(elsewhere, plainly, Terminal())
        assert [file.name for file in elsewhere.iterdir() if not file.name.startswith(".")] == []
        said = capsys.readouterr().out
        assert "0 of 27 done" in said
        assert f"Another ablate makes runs in {elsewhere}: kept runs that are not there yet" in said
    list_tables(elsewhere, plainly, Terminal())
    said = capsys.readouterr().out
    assert result in said
    assert "27 of 27 done, none missing" in said, "kept runs are put among those of this machine"
    assert "Another ablate" not in said
    shutil.rmtree(recipes / "moe_lm" / "results" / "ablations" / "runs")
    list_tables(tmp_path / "a third machine", plainly, Terminal())
    said = capsys.readouterr().out
    assert result in said
    assert re.search(r"0 of 27 done, \d+ processor minutes for the others", said)
    monkeypatch.setattr("moekit.ablation.table.RECIPES", tmp_path / "wheel")
    with pytest.raises(UserError, match="which this installation has not"):
        list_tables(tmp_path / "runs", plainly, Terminal())


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0.0, "less than 1 minute"),
        (0.4, "less than 1 minute"),
        (0.6, "about 1 minute"),
        (1.4, "about 1 minute"),
        (1.6, "about 2 minutes"),
        (127.6, "about 128 minutes"),
    ],
)
def test_minutes_left_are_spoken(minutes: float, words: str) -> None:
    assert spoken_minutes(minutes) == words


def test_the_last_step_of_a_run(tmp_path: Path) -> None:
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.csv").write_text("step,epoch\n")
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n9,0,1\n19,0,1\n2")
    assert last_step(tmp_path) == 19, "a row that is being written is none"
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n" + "".join(f"{i},0,{'1' * 50}\n" for i in range(900)))
    assert last_step(tmp_path) == 899


def test_a_table_of_a_recipe_is_found_from_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the result lies does not depend on how its file is named."""
    folder = tmp_path / "recipes" / "moe_lm" / "ablations"
    write_table(folder)
    monkeypatch.chdir(folder)
    assert results_folder(Path("table.yaml")) == tmp_path / "recipes" / "moe_lm" / "results" / "ablations"


def test_what_is_left_of_a_table_is_made_where_its_part_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that is printed has the folders that were given, and no choice of seeds and arms."""
    path = write_table(tmp_path)
    monkeypatch.setattr("moekit.ablation.processes.moekit_commands", fake())
    given = ["--runs", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main(["ablate", str(path), *given, "--seeds", "1", "--only", "many"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "runs of the table are not done: no result yet. To make them: " in said
    printed = said.rpartition("To make them: ")[2]
    assert printed.endswith(" ".join(["ablate", str(path), "--jobs", "2", *given[:4]])), printed
