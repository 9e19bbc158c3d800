"""Agreement: on the page, in the terminal, in markdown and beside other runs, with recall of facts or alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from fake_runs import edit, make_text_run
from rich.console import Console

from moekit.report import figure, figure_names, results_markdown, terminal_summary, write_comparison, write_report
from moekit.report.agreement import agreement_section, agreement_table, agreement_tiles
from moekit.report.reading import read_run
from moekit.report.recall import recall_section, recall_tiles
from moekit.report.wording import MISSING


def asked(verb: float = 0.75) -> dict[str, Any]:
    kinds = [
        {"kind": "verb", "recall": verb, "questions": 30, "languages": {"en": 0.9, "de": 0.6}},
        {"kind": "verb_attractor", "recall": 0.4, "questions": 10, "languages": {"de": 0.4}},
        {"kind": "undetermined", "recall": 0.52, "questions": 20, "languages": {"en": 0.5, "de": 0.54}},
    ]
    return {"task": "causal_lm", "choices": 2, "chance": 0.5, "kinds": kinds, "about": "agreement"}


FACTS = {
    "task": "causal_lm", "choices": 8, "chance": 0.125, "kinds": [{"kind": "known", "recall": 0.625, "questions": 9}]
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return edit(make_text_run(tmp_path / "run", steps=60), "summary.json", recall=[asked()])


def test_the_table_has_kinds_and_languages(run: Path) -> None:
    table = agreement_table(read_run(run))
    assert table.headers == ["agreement", "right", "en", "de", "chance", "questions"]
    assert list(table.rows) == [
        ("verb", "75.0 %", "90.0 %", "60.0 %", "50.0 %", "30"),
        ("verb attractor", "40.0 %", MISSING, "40.0 %", "50.0 %", "10"),
        ("undetermined", "52.0 %", "50.0 %", "54.0 %", "50.0 %", "20"),
    ]
    (tile,) = agreement_tiles(read_run(run))
    assert (tile.value, tile.remark) == ("66.2 %", "of 40 pairs of sentences, 50.0 % by chance"), "without the control"
    assert "| verb attractor | 40.0 % |" in results_markdown(run)


def test_the_page_and_the_terminal_have_it(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    for text in ('aria-label="Agreement by language and kind', "66.2 %", "verb attractor", "undetermined"):
        assert text in page, text
    assert "Recall of facts" not in page
    assert "agreement/causal_lm" in figure_names(run)
    drawn = figure("agreement/causal_lm", run)
    labels = {text.get_text() for text in drawn.legends[0].get_texts()} if drawn.legends else set()
    labels |= {text.get_text() for axes in drawn.axes if axes.get_legend() for text in axes.get_legend().get_texts()}
    assert labels == {"verb", "verb attractor", "undetermined", "chance"}
    console = Console(file=io.StringIO(), width=80)
    terminal_summary(run, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "agreement   verb 75 % \u00b7 verb attractor 40 %\n            undetermined 52 % \u00b7 chance 50 %" in said


def test_facts_and_agreement_stand_apart(run: Path, tmp_path: Path) -> None:
    edit(run, "summary.json", recall=[FACTS, asked()])
    folder = read_run(run)
    page = write_report(run).read_text(encoding="utf-8")
    assert "Recall of facts by frequency" in page
    assert "Agreement by language and kind" in page
    assert (recall_tiles(folder)[0].value, agreement_tiles(folder)[0].value) == ("62.5 %", "66.2 %")
    console = Console(file=io.StringIO(), width=80)
    terminal_summary(run, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "recall      known 62.5 % \u00b7 chance 12.5 %" in said
    other = edit(make_text_run(tmp_path / "dense", steps=60), "summary.json", recall=[asked(0.5)])
    plain = make_text_run(tmp_path / "plain", steps=60)
    text = write_comparison([run, other, plain], tmp_path / "c").with_suffix(".md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    (verb,) = [line for name, line in lines.items() if name.endswith(": verb")]
    assert [cell.strip() for cell in verb.split("|")[2:5]] == ["75.0 %", "50.0 %", MISSING]
    (known,) = [line for name, line in lines.items() if name.endswith(": known")]
    assert [cell.strip() for cell in known.split("|")[2:5]] == ["62.5 %", MISSING, MISSING]
    chances = [line for line in text.splitlines() if ": chance" in line]
    assert {cell.strip() for line in chances for cell in line.split("|")[2:3]} == {"12.5 %", "50.0 %"}


def test_a_run_that_was_not_asked_says_nothing_of_it(tmp_path: Path) -> None:
    for name, recall in (("none", None), ("facts", [FACTS]), ("broken", [{"task": "causal_lm", "about": "agreement"}])):
        run = edit(make_text_run(tmp_path / name, steps=60), "summary.json", recall=recall)
        folder = read_run(run)
        assert agreement_section(folder) is None
        assert agreement_tiles(folder) == []
        assert (recall_section(folder) is not None) == (name == "facts")
        assert 'id="agreement"' not in write_report(run).read_text(encoding="utf-8")
