"""What is said of a run's routers: fixed and learned load, dead experts, dropped tokens, experts per token."""

import json
import re
from pathlib import Path

import pytest
from fake_runs import edit, make_text_run, summary_of, write_rows
from shown_text import screen, words

from moekit.report import results_markdown, write_comparison, write_report
from moekit.report.health import experts_per_token, findings, layer_health
from moekit.report.reading import read_run
from moekit.report.wording import MISSING


def test_a_fixed_load_is_no_fault(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3, by_rule=True)
    found = findings(read_run(run))
    assert all(f.good for f in found)
    assert "4 layers assign tokens by a fixed rule; the busiest expert got 4.0 fair shares." in {f.text for f in found}
    html = words(write_report(run).read_text())
    assert "A fixed rule, which nobody trains, assigns the tokens in decoder.1, decoder.3" in html
    assert "an expert is dead" not in html
    assert "assigned by a fixed rule" in screen(run)
    assert " dead" not in screen(run)
    assert re.search(rf"\| decoder\.1 \| 8 \| [\d.]+ \| [\d.]+ \| 0\.0 % \| {MISSING} \|", results_markdown(run))
    text = write_comparison([run, run], tmp_path / "c.html").with_suffix(".md").read_text()
    assert "| dead experts | fixed rule | fixed rule |" in text


def test_a_layer_may_say_itself_whether_its_load_is_fixed(tmp_path: Path) -> None:
    load = [0.7, 0.3, 0.0, 0.0]
    layers = [
        {"name": "silent", "load": load},
        {"name": "no entropy", "load": load, "entropy": None},
        {"name": "fixed", "load": load, "entropy": 0.5, "fixed_load": True},
        {"name": "learned", "load": load, "entropy": None, "fixed_load": False, "new key": {"x": 1}},
    ]
    (tmp_path / "routing.json").write_text(json.dumps({"layers": layers}))
    run = read_run(tmp_path)
    assert [x.fixed for x in layer_health(run)] == [False, True, True, False]
    told = {f.text: f.good for f in findings(run)}
    assert told["4 dead experts of 8 in 2 layers."] is False
    assert told["2 layers assign tokens by a fixed rule; the busiest expert got 2.8 fair shares."] is True


def test_dead_experts_of_a_running_run_count_where_routers_are_learned(tmp_path: Path) -> None:
    row = {"step": 1, "train/causal_lm/loss": 5.0, "train/routing/dead_experts": 3}
    write_rows(tmp_path / "metrics.csv", [row])
    assert all(f.good for f in findings(read_run(tmp_path)))
    write_rows(tmp_path / "metrics.csv", [{**row, "train/routing/entropy": 0.4}])
    assert "3 dead experts when last counted." in {f.text for f in findings(read_run(tmp_path)) if not f.good}


def test_dropless_says_nothing_of_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_text_run(tmp_path, steps=3, by_rule=True)
    assert "drop" not in screen(run)
    assert not any("drop" in f.text for f in findings(read_run(run)))


def test_experts_per_token_are_shown_where_known(tmp_path: Path) -> None:
    known = make_text_run(tmp_path / "known", steps=3, recipe="remoe", experts_per_token=1.83)
    unknown = make_text_run(tmp_path / "unknown", steps=3)
    assert experts_per_token(read_run(known)) == pytest.approx(1.83)
    assert experts_per_token(read_run(unknown)) is None
    assert "1.83 per token" in screen(known)
    assert "| decoder.1 | 8 | 1.83 |" in results_markdown(known)
    assert "decoder.1 8 1.83" in words(write_report(known).read_text())
    text = write_comparison([known, unknown], tmp_path / "c.html").with_suffix(".md").read_text()
    assert f"| experts per token | 1.83 | {MISSING} |" in text
    for told in (screen(unknown), results_markdown(unknown), words(write_report(unknown).read_text())):
        assert not re.search(r"\d per token|experts per token|Per token:", told)


def test_experts_per_token_of_the_summary_and_over_time(tmp_path: Path) -> None:
    run = make_text_run(tmp_path, steps=3)
    routing = summary_of(run)["routing"]
    routing["layers"]["decoder.3"]["experts_per_token"] = 2.5
    edit(run, "summary.json", routing=routing)
    rows = [{"step": i, "train/causal_lm/loss": 5.0, "train/routing/experts_per_token": 8 - i} for i in range(1, 5)]
    write_rows(run / "metrics.csv", rows)
    assert experts_per_token(read_run(run)) == 2.5
    html = write_report(run).read_text()
    assert "decoder.3 8 2.50" in words(html)
    assert 'aria-label="Experts per token over steps' in html


def test_what_experts_like_is_shown_where_it_was_counted(tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "run", steps=3)
    assert "What experts like" not in write_report(run).read_text()
    assert "typical" not in screen(run)

    pieces = [{"piece": "\u2581<b>", "count": 9, "lift": 3.21}, {"piece": "x", "count": 7, "lift": 1.5}]
    liked = [{"expert": 2, "pieces": pieces}, {"expert": "none"}, {"expert": 0, "pieces": []}]
    layers = json.loads((run / "routing.json").read_text())["layers"]
    edit(run, "routing.json", layers=[{**layer, "typical": liked} for layer in layers])
    name = max(layer["name"] for layer in layers)
    page = write_report(run).read_text()
    assert "\u2581&lt;b&gt; \u00d73.2 \u00b7 x \u00d71.5" in " ".join(page.split())
    assert f"{name}, expert 2" in page
    text = results_markdown(run)
    assert f"{name}, expert 2 |" in text
    assert "| expert | typical pieces |\n|:---|:---|\n" in text  # words, which begin where the column does
    assert re.search(r"\| layer \| experts \|.*\n\|:---\|---:\|", text)
    assert f"typical {name}/2 \u2581<b>" in " ".join(screen(run).split())


def test_of_many_experts_the_keenest_are_shown(tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "run", steps=3)

    liked = [{"expert": n, "pieces": [{"piece": f"p{n}", "count": 9, "lift": 2 + n / 100}]} for n in range(100)]
    layers = json.loads((run / "routing.json").read_text())["layers"][:2]
    edit(run, "routing.json", layers=[{**layer, "typical": liked} for layer in layers])
    page = write_report(run).read_text()
    assert "Shown are 64 of 200 experts." in page
    assert [f", expert {n}<" in page for n in (67, 68, 99)] == [False, True, True]
