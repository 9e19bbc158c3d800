"""Scores of written answers, of whatever tasks the record names, in all three forms of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from moekit.report import results_markdown, terminal_summary, write_report
from moekit.report.reading import read_run
from moekit.report.results import answer_tables, answers
from moekit.report.wording import MISSING

RECORD: dict[str, Any] = {
    "title": "Riddles <1>",
    "explanation": "Say what it is.",
    "perplexity": True,
    "samples": {},
    "scores": {"exact_match": "Exact match", "wit": "Wit"},
}


def folder(path: Path, **changes: Any) -> Path:
    scores = {"average": 40.0, "signature": "s", "directions": {"en-en": 30.0, "en-de": 50.0}}
    summary = {
        "recipe": "switch", "loss": {"riddles": 1.5}, "test": {}, "bleu": None, "tasks": {"riddles": RECORD},
        "exact_match": scores, "wit": {"average": 7.25, "directions": {"en-de": 7.25}},
    } | changes  # fmt: skip
    path.mkdir(exist_ok=True)
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_answers_are_in_all_forms(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    (found,) = answer_tables(read_run(run))
    assert found.rows == [("en-en", "30.0", MISSING), ("en-de", "50.0", "7.2"), ("average", "40.0", "7.2")]
    html = write_report(run).read_text()
    assert 'id="answers"' in html
    assert "Riddles &lt;1&gt;" in html
    assert "Riddles <1>" not in html
    console = Console(record=True, width=100)
    terminal_summary(run, console)
    shown, text = console.export_text(), results_markdown(run)
    assert "Exact match 40.0" in shown
    assert "Not tested yet" not in shown
    assert "| average | 40.0 | 7.2 |" in text
    for form in (html, shown, text):
        assert "Exact match" in form
        assert "Wit" in form


def test_a_record_that_makes_no_sense_is_passed_over(tmp_path: Path) -> None:
    for tasks in (None, [], {"riddles": None}, {"riddles": {"scores": 3}}, {"riddles": {"scores": {"no": "No"}}}):
        run = folder(tmp_path / "run", tasks=tasks)
        assert answers(read_run(run)) == {}
        assert 'id="answers"' not in write_report(run).read_text()


def test_the_headline_keeps_the_names_of_scores(tmp_path: Path) -> None:
    record = RECORD | {"scores": {"exact_match": "F1"}}
    console = Console(record=True, width=100)
    terminal_summary(folder(tmp_path / "run", tasks={"riddles": record}), console)
    assert console.export_text().splitlines()[1].startswith("F1 40.0 ")
