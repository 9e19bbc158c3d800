"""Kept numbers of runs: what is made nowhere again, and what is made all the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tables import TABLE, began, changed, fake, formula, plainly, run, write_table

from moekit.ablation.plan import Job, Plan
from moekit.ablation.result import comparable
from moekit.ablation.session import Estimate, _restore
from moekit.ablation.table import read_table
from moekit.data.sources import open_source
from moekit.errors import UserError

CLAIM: dict[str, Any] = TABLE["claims"][0]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of the table's runs; to be copied."""
    folder = tmp_path_factory.mktemp("kept")
    run(write_table(folder), folder / "runs")
    return folder / "results" / "runs"


def test_kept_runs_are_made_nowhere_again(tmp_path: Path) -> None:
    """With the small files alone, on another machine, a table has the same result, and only what lacks is run."""
    path, runs, results = write_table(tmp_path), tmp_path / "runs", tmp_path / "results"
    found, _ = run(path, runs)
    assert found is not None
    kept = sorted((results / "runs").glob("*.json"))
    assert len(kept) == began(runs)
    elsewhere = tmp_path / "elsewhere"
    again, said = run(path, elsewhere, out=results)
    assert began(elsewhere) == 0
    assert "15 of 15 done" in said
    assert again is not None
    assert comparable(again) == comparable(found)
    assert again["made"]["minutes"] == found["made"]["minutes"]
    plan, listed = Plan.of(read_table(path), plainly), tmp_path / "listed"
    _restore(plan, listed, results)
    cost = Estimate.of(plan, listed, {})
    assert (cost.done, cost.runs, cost.minutes) == (27, 27, 0.0)
    for lost in kept[:3]:
        lost.unlink()
    third = tmp_path / "third"
    again, _ = run(path, third, out=results)
    assert began(third) == 3
    assert again is not None
    assert comparable(again) == comparable(found)
    assert sorted((results / "runs").glob("*.json")) == kept


def test_a_run_that_diverged_is_kept_and_one_that_failed_is_not(tmp_path: Path) -> None:
    def ending(job: Job) -> dict[str, Any]:
        ends = {1: "diverged", 2: "broken"}
        few = job.config.model.num_experts == 2
        return formula(job) | {"end": ends.get(job.config.train.seed, "done") if few else "done"}

    path = write_table(tmp_path)
    first, _ = run(path, tmp_path / "runs", fake(ending))
    again, _ = run(path, tmp_path / "more", fake(ending), out=tmp_path / "results")
    assert first is not None
    assert again is not None
    assert began(tmp_path / "more") == 1
    assert comparable(first) == comparable(again)
    assert again["claims"][0]["failed"] == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-5], "cannot be used: "),
        (lambda text: text.replace('"version": 1', '"version": 9'), "it must be of version 1, with record, summary"),
        (lambda text: text.replace('"minutes"', '"minuten"'), "cannot be used: "),
        *(
            (lambda text, damage=damage: json.dumps(json.loads(text) | damage), "must have the numbers of a run that")
            for damage in (
                {"summary": [1]},
                {"summary": {}},
                {"mechanisms": "x"},
                {"last": None},
                {"commit": 7},
                {"record": {"state": "failed"}},
                {"record": {"state": "done", "minutes": "x"}},
            )
        ),
        (lambda text: re.sub('"run": "[^"]*"', '"run": "moe_lm-1"', text), "it has the numbers of another run"),
        (lambda text: re.sub('"kin": "[^"]*"', '"kin": "1"', text), "it has the numbers of another run"),
    ],
)
def test_a_damaged_kept_run_is_refused_by_name(
    damage: Callable[[str], str], said: str, kept: Path, tmp_path: Path
) -> None:
    path = write_table(tmp_path)
    shutil.copytree(kept, tmp_path / "results" / "runs")
    damaged = sorted((tmp_path / "results" / "runs").glob("*.json"))[0]
    damaged.write_text(damage(damaged.read_text()))
    with pytest.raises(UserError, match=f"{damaged.name} cannot be used: ") as caught:
        run(path, tmp_path / "more", out=tmp_path / "results")
    assert said in str(caught.value)


def test_kept_runs_that_do_not_say_their_name_are_taken(kept: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path)
    shutil.copytree(kept, tmp_path / "results" / "runs")
    for copied in (tmp_path / "results" / "runs").glob("*.json"):
        known = json.loads(copied.read_text())
        assert known.pop("run") == copied.stem
        copied.write_text(json.dumps(known))
    run(path, tmp_path / "more", out=tmp_path / "results")
    assert began(tmp_path / "more") == 0


def test_runs_that_cannot_be_kept_are_not_made(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*a file is in the place of a folder"):
        run(path, tmp_path / "runs")
    assert began(tmp_path / "runs") == 0


def test_a_trained_run_is_not_taken_from_its_numbers_where_its_model_is_wanted(tmp_path: Path) -> None:
    table = changed()
    table["arms"]["again"] = {"about": "other capacity", "of": "many", "settings": {"model.eval_capacity_factor": 4.0}}
    path = write_table(tmp_path, table)
    first, _ = run(path, tmp_path / "runs")
    assert first is not None
    evaluated = [
        job
        for job in Plan.of(read_table(path), plainly).jobs({"many": 0.004, "few": 0.004})
        if job.of is not None and job.config.train.seed == 3
    ]
    (tmp_path / "results" / "runs" / f"{evaluated[0].folder(tmp_path).name}.json").unlink()
    run(path, tmp_path / "more", out=tmp_path / "results")
    assert began(tmp_path / "more") == 2, "the evaluation, and the training whose model it needs"


def capacities() -> tuple[dict[str, Any], dict[str, Any]]:
    """A table of an arm that trains, and one that evaluates its models too."""
    alone = changed(learning_rates=None, control=None, no_control="a test")
    alone["arms"] = {name: arm for name, arm in alone["arms"].items() if name != "again"}
    more = json.loads(json.dumps(alone))
    more["arms"]["roomy"] = {"about": "room", "of": "many", "settings": {"model.eval_capacity_factor": 4.0}}
    return alone, more


def test_numbers_that_another_table_has_put_there_do_not_replace_a_model(tmp_path: Path) -> None:
    """The table alone puts kept numbers into the folder of runs; the other one needs the models, and trains them."""
    alone, more = capacities()
    first, second = write_table(tmp_path, alone, "alone"), write_table(tmp_path, more, "more")
    results, here = tmp_path / "results", tmp_path / "here"
    run(first, tmp_path / "runs", out=results)
    run(first, here, out=results)
    assert began(here) == 0
    found, _ = run(second, here, out=results)
    assert began(here) == 5 + 5, "the models of `many`, and their evaluations; `few` is kept"
    assert found is not None
    run(second, here, out=results)
    run(second, tmp_path / "there", out=results)
    assert began(here) == 10
    assert began(tmp_path / "there") == 0


def test_a_model_is_kept_with_what_it_was_evaluated_to(tmp_path: Path) -> None:
    """Made anew elsewhere it comes out a little otherwise: the pair is of one training, wherever it is read."""
    alone, more = capacities()
    first, second = write_table(tmp_path, alone, "alone"), write_table(tmp_path, more, "more")
    results = tmp_path / "results"

    def elsewhere(job: Job) -> dict[str, Any]:
        return formula(job) | {"loss": formula(job)["loss"] + 0.25}

    run(first, tmp_path / "runs", out=results)
    made, _ = run(second, tmp_path / "here", fake(elsewhere), out=results)
    read, _ = run(second, tmp_path / "there", out=results)
    assert began(tmp_path / "there") == 0
    assert made is not None
    assert read is not None
    assert comparable(made) == comparable(read)
    loss = {arm: read["arms"][arm]["runs"]["1"]["metrics"]["test.causal_lm.loss"] for arm in ("many", "few")}
    assert loss["many"] > loss["few"], "0.25 more, which `few`, made before, has not"


def test_an_evaluation_is_not_compared_with_another_training(tmp_path: Path) -> None:
    """An arm more, on a machine where training comes out otherwise: the other evaluations are of its models too."""
    _, more = capacities()
    more["claims"] = [CLAIM | {"kind": "within checkpoint", "arm": "roomy", "against": "many", "smallest": 0.005}]
    results = tmp_path / "results"

    def elsewhere(job: Job) -> dict[str, Any]:
        return formula(job) | {"loss": formula(job)["loss"] + 0.02}

    first, _ = run(write_table(tmp_path, more), tmp_path / "runs", out=results)
    more["arms"]["wide"] = {"about": "more", "of": "many", "settings": {"model.eval_capacity_factor": 8.0}}
    path = write_table(tmp_path, more)
    second, _ = run(path, tmp_path / "here", fake(elsewhere), out=results)
    third, _ = run(path, tmp_path / "there", out=results)
    assert began(tmp_path / "here") == 3 * 5, "the models, and both evaluations of them"
    assert began(tmp_path / "there") == 0
    for found in (first, second, third):
        assert found is not None
        assert found["claims"][0]["difference"] == 0.0
        assert found["claims"][0]["verdict"] == "inconclusive"


def test_a_model_that_another_table_has_kept_anew_takes_its_evaluations_with_it(tmp_path: Path) -> None:
    """A kept evaluation says which numbers its model came to; where these are others now, both are made again."""
    _, more = capacities()
    results, path = tmp_path / "results", write_table(tmp_path, more)
    run(path, tmp_path / "runs", out=results)
    (name,) = {
        job.folder(tmp_path).name for job in Plan.of(read_table(path), plainly).jobs({}) if job.label == "many, seed 2"
    }
    kept = json.loads((results / "runs" / f"{name}.json").read_text())
    kept["summary"]["loss"]["causal_lm"] += 0.1
    (results / "runs" / f"{name}.json").write_text(json.dumps(kept))
    run(path, tmp_path / "here", out=results)
    assert began(tmp_path / "here") == 2, "that model and its evaluation"
    run(path, tmp_path / "there", out=results)
    assert began(tmp_path / "there") == 0


def test_numbers_of_a_kept_file_that_changed_are_put_anew(kept: Path, tmp_path: Path) -> None:
    path, results = write_table(tmp_path), tmp_path / "results"
    shutil.copytree(kept, results / "runs")
    first, _ = run(path, tmp_path / "more", out=results)
    for file in (results / "runs").glob("*.json"):
        known = json.loads(file.read_text())
        known["summary"]["test"]["causal_lm"]["loss"] += 1.0
        file.write_text(json.dumps(known))
    second, _ = run(path, tmp_path / "more", out=results)
    assert began(tmp_path / "more") == 0
    assert first is not None
    assert second is not None
    means = [found["claims"][0]["means"]["many"] for found in (first, second)]
    assert means[1] - means[0] == pytest.approx(1.0)


def test_text_that_changed_is_not_compared_with_what_it_was(tmp_path: Path) -> None:
    """Runs are named by the path of a text: an arm more, of another text, would be in pairs with the first ones."""
    corpus, text = tmp_path / "corpus", tmp_path / "corpus" / "en.txt"
    corpus.mkdir()
    text.write_text("old text\n" * 50)
    table = changed(learning_rates=None, control=None, no_control="a test")
    table["arms"].pop("again")
    table["settings"]["data"] = {"source": "text", "path": str(corpus)}

    def reading(job: Job) -> dict[str, Any]:
        return formula(job) | {"text": open_source("text", str(corpus)).fingerprint()}

    results, runs = tmp_path / "results", tmp_path / "runs"
    first, _ = run(write_table(tmp_path, table), runs, fake(reading), out=results)
    kept = {path: path.read_text() for path in (results / "runs").glob("*.json")}
    assert len(kept) == 10
    table["arms"]["more"] = {"settings": {"model.num_experts": 4}}
    path = write_table(tmp_path, table)
    text.write_text("new text\n" * 50)
    for where in (runs, tmp_path / "more"):  # where they were made, and where their numbers alone are
        with pytest.raises(UserError, match=r"corpus must be the one .* changed since many, seed 1 was made"):
            run(path, where, fake(reading), out=results)
        assert began(where) in (0, 10)
    text.unlink()
    found, _ = run(path, tmp_path / "third", fake(lambda job: formula(job)), out=results)
    assert found is not None
    text.write_text("old text\n" * 50)
    again, _ = run(path, tmp_path / "more", fake(reading), out=results)
    assert again is not None
    assert first is not None
    assert again["claims"][0]["means"] == first["claims"][0]["means"]
