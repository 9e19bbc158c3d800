"""Reading run folders: missing, broken, resumed, and full of numbers that are none."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import edit, make_run, write_rows
from shown_text import screen

from moekit.errors import UserError
from moekit.report.health import drop_rate, dropped, findings, layer_health
from moekit.report.reading import FILES, read_run
from moekit.report.run_folder import loads, number
from moekit.report.series import Series, limits, milestones, smooth, smoothing_window, specialisation, thin
from moekit.runs.record import Sample


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "nowhere")


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="has none of them"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_each_file_alone(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, steps=3, without=tuple(f for f in FILES if f != name))
    run = read_run(tmp_path)
    assert set(run.notes) == set(FILES) - {name}
    assert all(f"no {other}" in note for other, note in run.notes.items())


def test_broken_files_are_noted(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    (tmp_path / "summary.json").write_text('{"bleu": ')
    (tmp_path / "routing.json").write_text("[1, 2]")
    (tmp_path / "samples.json").write_text('[{"direction": "a-b"}, 3, {"hypothesis": "x", "source": null}]')
    (tmp_path / "environment.json").write_bytes(b"\xff\xfe{")
    run = read_run(tmp_path)
    assert "could not be read" in run.notes["summary.json"]
    assert "must hold an object: got list" in run.notes["routing.json"]
    assert "could not be read" in run.notes["environment.json"]
    assert run.samples == (Sample(task="translation", hypothesis="x"),)


def test_metrics_are_sorted_and_the_last_value_of_a_step_wins(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,valid/loss\n1,0,5,\n2,0,4,\n3,0,3.5,9\n\nstep,epoch,train/loss,valid/loss\n2,0,4.5,\n,,,\n"
        "x,0,1,\n3,0,nan,\n4,0,inf,2\n"
    )
    run = read_run(tmp_path)
    assert run.metrics["train/loss"].step.tolist() == [1, 2, 3, 4]
    assert run.metrics["train/loss"].value[:2].tolist() == [5, 4.5]
    assert math.isnan(run.metrics["train/loss"].value[2])
    assert run.metrics["train/loss"].finite.step.tolist() == [1, 2]
    assert run.metrics["valid/loss"].step.tolist() == [3, 4]
    assert "epoch" not in run.metrics
    assert "line 9" in run.notes["metrics.csv"]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_metrics_without_steps(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert "column step" in read_run(tmp_path).notes["metrics.csv"]


def test_scores_come_from_the_metrics_where_there_is_no_summary(tmp_path: Path) -> None:
    full = read_run(make_run(tmp_path / "full", steps=40))
    fit = read_run(make_run(tmp_path / "fit", steps=40, without=("summary.json",)))
    assert full.scores("bleu").origin == "test"
    assert fit.scores("bleu").origin == "valid"
    assert full.scores("bleu").directions.keys() == fit.scores("bleu").directions.keys()
    assert fit.scores("chrf").average is None
    assert fit.by_task("perplexity")["translation"] == pytest.approx(math.exp(fit.by_task("loss")["translation"]))
    assert fit.steps == 40
    assert fit.name == "zcode_m3 · tiny"


def test_test_scores_in_the_metrics_win_over_validation(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"step": 1, "valid/bleu/a-b": 3.0, "test/bleu/a-b": 7.0}])
    scores = read_run(tmp_path).scores("bleu")
    assert (scores.origin, scores.average, scores.directions) == ("test", 7.0, {"a-b": 7.0})


def test_number_accepts_finite_numbers_only() -> None:
    tree = {"a": {"b": 3, "nan": math.nan, "text": "4", "yes": True}}
    assert number(tree, "a", "b") == 3.0
    assert [number(tree, "a", key) for key in ("nan", "text", "yes", "none")] == [None] * 4
    assert number(tree, "a", "b", "c") is None


def test_loads_are_shares() -> None:
    assert loads({"load": [1, 3]}) == [0.25, 0.75]
    for bad in ([], [0, 0], [1, -1], [1, None], "12", None):
        assert loads({"load": bad}) == []


def test_dense_is_told_from_unfinished(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "dense", steps=2, experts=0, without=("routing.json",))).dense
    assert not read_run(make_run(tmp_path / "moe", steps=2)).dense
    assert not read_run(make_run(tmp_path / "fit", steps=2, without=("summary.json", "routing.json"))).dense
    assert not read_run(make_run(tmp_path / "lost", steps=2, without=("routing.json",))).dense


def test_layer_health(tmp_path: Path) -> None:
    layers = [
        {"name": "even", "load": [0.25] * 4, "load_by_language": {"a": [0.5, 0.5, 0, 0], "b": [0, 0, 0.5, 0.5]}},
        {"name": "collapsed", "load": [1, 0, 0, 0], "load_by_language": {"a": [1, 0, 0, 0], "b": [1, 0, 0, 0]}},
        {"name": "unusable", "load": []},
    ]
    (tmp_path / "routing.json").write_text(json.dumps({"languages": ["a", "b"], "layers": layers}))
    even, collapsed = layer_health(read_run(tmp_path))
    assert (even.evenness, even.load_cv, even.dead, even.specialisation) == (pytest.approx(1), 0, 0, pytest.approx(1))
    assert (collapsed.evenness, collapsed.dead, collapsed.largest, collapsed.specialisation) == (0, 3, 4, 0)
    told = {f.text: f.good for f in findings(read_run(tmp_path))}
    assert told["3 dead experts of 8 in 2 layers."] is False
    assert told["The busiest expert got 4.0 fair shares (collapsed)."] is False


def test_drop_rate_is_that_of_late_training(tmp_path: Path) -> None:
    rows = [{"step": i, "train/routing/drop_rate": 0.5 if i < 90 else 0.02} for i in range(100)]
    write_rows(tmp_path / "metrics.csv", rows)
    (tmp_path / "summary.json").write_text('{"routing": {"drop_rate": 0.0}}')
    run = read_run(tmp_path)
    assert (drop_rate(run), dropped(run)) == (pytest.approx(0.02), "2.0 %")
    assert "2.0 % of the assignments dropped late in training." in [f.text for f in findings(run)]


def test_a_drop_rate_of_evaluation_is_not_called_one_of_training(tmp_path: Path) -> None:
    """A fine-tuning of a few steps logs none, a model fresh from surgery has not trained: evaluation drops nothing."""
    (tmp_path / "summary.json").write_text('{"routing": {"drop_rate": 0.0}}')
    run = read_run(tmp_path)
    assert (drop_rate(run), dropped(run)) == (0.0, "0.0 % (eval)")
    assert "No token was dropped in evaluation." in [f.text for f in findings(run)]
    assert "0.0 % dropped (eval)" in screen(tmp_path)


def test_a_loss_that_is_no_number_is_a_finding(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.csv", [{"step": i, "train/loss": math.nan if i == 3 else 1.0} for i in range(9)])
    assert [f.text for f in findings(read_run(tmp_path)) if not f.good] == [
        "train/loss was not a number at 1 logged step."
    ]


def test_a_layer_of_two_choices_is_crowded_sooner(tmp_path: Path) -> None:
    """Of 8 experts, two for a token, the busiest can have 4 fair shares at most."""
    load = [0.43, 0.21, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06]
    run = make_run(tmp_path / "r", steps=40)
    for tokens, good in ((1000, True), (500, False)):
        layer = {"name": "decoder.1", "load": load, "assignments": 1000, "tokens": tokens, "entropy": 1.0}
        edit(run, "routing.json", layers=[layer])
        told = {finding.text: finding.good for finding in findings(read_run(run))}
        assert told["The busiest expert got 3.4 fair shares (decoder.1)."] is good


def test_smooth_is_a_moving_average_without_bad_values() -> None:
    value = np.arange(500, dtype=float)
    value[100] = np.nan
    series = smooth(Series(np.arange(500.0), value))
    assert smoothing_window(499) == 9
    assert len(series.value) == 499
    assert series.value[50] == pytest.approx(50)
    assert series.value[0] == pytest.approx(2)
    constant = smooth(Series(np.arange(300.0), np.full(300, 0.7)))
    assert constant.value == pytest.approx(np.full(300, 0.7))
    value = np.random.default_rng(0).normal(size=431)
    value[100] = 1e20
    series = smooth(Series(np.arange(431.0), value))
    half = smoothing_window(431) // 2
    assert series.value == pytest.approx([value[max(0, i - half) : i + half + 1].mean() for i in range(431)])


def test_thin_keeps_spikes_and_ends() -> None:
    value = np.zeros(50_000)
    value[12_345] = 9
    series = thin(Series(np.arange(50_000.0), value))
    assert len(series.value) <= 1002
    assert series.value.max() == 9
    assert (series.step[0], series.step[-1]) == (0, 49_999)


def test_limits_always_span() -> None:
    for values in ([], [math.nan], [3.0], [0.0], [2.0, 2.0], [1.0, 5.0], [-1.0, math.inf]):
        low, high = limits(np.array(values))
        assert low < high
    assert limits(np.array([2.0, 4.0]), start_at_zero=True)[0] == 0


def test_milestones() -> None:
    series = Series(np.arange(1, 1001.0), np.zeros(1000))
    steps = milestones([series])
    assert (len(steps), steps[0], steps[-1]) == (8, 1, 1000)
    assert milestones([Series(np.array([5.0]), np.array([1.0]))]) == [5]
    assert milestones([]) == []


def test_specialisation_bounds() -> None:
    assert specialisation([[1, 0], [0, 1]]) == pytest.approx(1)
    assert specialisation([[0.3, 0.7], [0.3, 0.7]]) == pytest.approx(0)
    assert specialisation([[0.5, 0.5]]) is None
    assert specialisation([[1.0], [1.0]]) is None
