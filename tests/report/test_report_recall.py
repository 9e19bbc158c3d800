"""Recall of facts and the floor of the loss: on the page, in the terminal, in markdown and beside other runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_runs import edit, make_text_run
from rich.console import Console

from moekit.report import results_markdown, terminal_summary, write_comparison, write_report
from moekit.report.reading import read_run
from moekit.report.recall import above_floor, floor_lines, floors, recall_table, recalls
from moekit.report.run_folder import Series
from moekit.report.wording import MISSING

FLOORS = [
    {"task": "causal_lm", "split": "valid", "knowing": 1.5, "guessing": 2.1},
    {"task": "causal_lm", "split": "test", "knowing": 1.25, "guessing": 2.0},
]
KNOWN = [0.9, 0.85, 0.8, 0.7, 0.66, 0.6, 0.5, 0.4, 0.3, None]


def asked(known: float = 0.625) -> list[dict[str, Any]]:
    kinds = [
        {"kind": "known", "recall": known, "questions": 900, "deciles": KNOWN, "languages": {"en": 0.75, "de": 0.5}},
        {
            "kind": "composed",
            "recall": 0.25,
            "questions": 40,
            "deciles": [None] * 9 + [0.25],
            "languages": {"en": 0.25},
        },
        {"kind": "unknowable", "recall": 0.13, "questions": 500, "deciles": [None] * 10, "languages": {"en": 0.13}},
    ]
    return [{"task": "causal_lm", "choices": 8, "chance": 0.125, "kinds": kinds}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return edit(make_text_run(tmp_path / "run", steps=60), "summary.json", floors=FLOORS, recall=asked())


def test_what_is_read(run: Path) -> None:
    folder = read_run(run)
    assert {key: found.guessing for key, found in floors(folder).items()} == {
        ("causal_lm", "valid"): 2.1, ("causal_lm", "test"): 2.0
    }  # fmt: skip
    assert above_floor(folder, "causal_lm", 1.75) == 0.5
    assert above_floor(folder, "causal_lm", 1.75, "valid") == 0.25
    assert above_floor(folder, "denoising", 1.75) is None
    assert above_floor(folder, "causal_lm", None) is None
    table = recall_table(folder)
    assert table.headers == ["facts", "recall", "en", "de", "chance", "questions"]
    assert table.rows[0][:4] == ("known", "62.5 %", "75.0 %", "50.0 %")
    assert [row[4:] for row in table.rows] == [("12.5 %", "900"), ("12.5 %", "40"), ("12.5 %", "500")]


@pytest.mark.parametrize(
    "broken", [None, "text", {"task": 3}, [3], [{"task": "causal_lm"}], [{"task": "causal_lm", "kinds": "x"}]]
)
def test_broken_records_are_left_out(run: Path, broken: Any) -> None:
    folder = read_run(edit(run, "summary.json", floors=broken, recall=broken))
    assert floors(folder) == {}
    assert recalls(folder) == []
    assert "Recall of facts" not in write_report(run).read_text(encoding="utf-8")


def test_the_page_draws_recall_and_the_floor(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    for text in (
        "Recall of facts by frequency", 'aria-label="Recall by decile of frequency"', "decile of frequency",
        "unknowable", "62.5 %", "guessing facts", "above the floor", "of known facts, 12.5 % by chance",
    ):  # fmt: skip
        assert text in page, text
    plain = make_text_run(run.parent / "plain", steps=60)
    without = write_report(plain).read_text(encoding="utf-8")
    assert not any(text in without for text in ("Recall of facts", "guessing facts", "above the floor"))


def test_the_terminal_and_the_text_say_it(run: Path) -> None:
    loss = next(float(x["loss"]) for x in [read_run(run).summary["test"]["causal_lm"]])
    console = Console(file=io.StringIO(), width=80)
    terminal_summary(run, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"loss {loss:.4g}, {loss - 1.25:.3f} above it" in said
    assert "recall      known 62.5 % · composed 25.0 % · unknowable 13.0 % · chance 12.5 %" in said
    assert len(said.splitlines()) <= 24
    text = results_markdown(run)
    assert "Recall of facts" in text
    assert "| known | 62.5 % | 75.0 % | 50.0 % | 12.5 % | 900 |" in text


def test_a_comparison_has_both(run: Path, tmp_path: Path) -> None:
    other = edit(make_text_run(tmp_path / "dense", steps=60), "summary.json", floors=FLOORS, recall=asked(0.375))
    plain = make_text_run(tmp_path / "plain", steps=60)
    text = write_comparison([run, other, plain], tmp_path / "c").with_suffix(".md").read_text(encoding="utf-8")
    assert "Loss above the floor" in text
    (known,) = [line for line in text.splitlines() if "known |" in line and "unknowable" not in line]
    assert "62.5 %" in known
    assert "37.5 %" in known
    assert known.rstrip(" |").endswith(MISSING)
    assert "recall" not in write_comparison([plain, plain], tmp_path / "d").read_text(encoding="utf-8").lower()


def as_twins(sparse: Path, dense: Path, **dense_model: object) -> list[Path]:
    """Two runs whose settings say that they differ in their experts, and in what else is given."""
    for folder, model in ((sparse, {"num_experts": 4}), (dense, {"num_experts": 0, **dense_model})):
        said = {"recipe": "moe_lm", "variant": folder.name, "model": {"dim": 8, **model}}
        (folder / "config.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    return [sparse, dense]


def test_a_run_beside_its_twin_says_what_one_pair_can(run: Path, tmp_path: Path) -> None:
    """Both curves of recall and of the loss, the floor they have in common, and that it is one pair."""
    dense = edit(make_text_run(tmp_path / "dense", steps=60), "summary.json", floors=FLOORS, recall=asked(0.375))
    page = write_comparison(as_twins(run, dense), tmp_path / "twin.html", known=["Over 5 pairs."])
    text = page.read_text(encoding="utf-8")
    for words in ("What one pair can say", "with one seed", "Over 5 pairs.", "Recall of facts by frequency", "floor</"):
        assert words in text, words
    assert "> Over 5 pairs." in page.with_suffix(".md").read_text(encoding="utf-8")
    unknown = write_comparison([run, dense], tmp_path / "unknown.html").read_text(encoding="utf-8")
    assert "No result of several pairs is known" in unknown
    plain = make_text_run(tmp_path / "plain", steps=60)
    for runs in ([run, plain], as_twins(run, dense, dim=16)):
        other = write_comparison(runs, tmp_path / "other.html", known=["Over 5 pairs."])
        assert "one pair" not in other.read_text(encoding="utf-8").lower()


def test_a_floor_is_drawn_where_all_runs_have_the_same(run: Path, tmp_path: Path) -> None:
    other = [{**floor, "knowing": 1.0} for floor in FLOORS]
    for floors_of, drawn in ((FLOORS, True), (other, False), (None, False)):
        dense = edit(make_text_run(tmp_path / f"dense {drawn}", steps=60), "summary.json", floors=floors_of)
        lines = floor_lines([read_run(run), read_run(dense)], "causal_lm", [Series(np.arange(3.0), np.arange(3.0))])
        assert [line.series.value[0] for line in lines] == ([2.1, 1.5] if drawn else [])
    assert floor_lines([read_run(run)], "causal_lm", []) == []


def test_text_of_other_domains_is_told(run: Path, tmp_path: Path) -> None:
    of = {"task": "causal_lm", "sentences": 1200, "guessing": 2.0}
    told = [
        {**of, "name": "talks", "loss": 2.25, "above_test": 0.5, "knowing": 1.0},
        {**of, "name": "letters", "loss": 3.0, "above_test": None, "knowing": None},
        {"name": "broken"},
    ]
    edit(run, "summary.json", domains=told)
    text = results_markdown(run)
    assert "| talks | 2.25 | 0.500 | 1.250 | 1,200 |" in text
    assert f"| letters | 3 | {MISSING} | {MISSING} | 1,200 |" in text
    assert "Text of other domains" in write_report(run).read_text(encoding="utf-8")
    plain = make_text_run(tmp_path / "plain", steps=60)
    assert "other domains" not in write_report(plain).read_text(encoding="utf-8")
    both = write_comparison([run, plain], tmp_path / "c").with_suffix(".md").read_text(encoding="utf-8")
    assert f"| talks | 2.25 | {MISSING} |" in both


def test_words_are_called_words(run: Path, tmp_path: Path) -> None:
    """What was asked of a translation run is about words: on the page, in text and in comparisons."""
    words = [{**record, "about": "words"} for record in asked()]
    edit(run, "summary.json", recall=words)
    table = recall_table(read_run(run))
    assert (table.headers[0], table.title) == ("words", "Recall of words")
    page, text = write_report(run).read_text(encoding="utf-8"), results_markdown(run)
    assert "Recall of words by frequency" in page
    assert "of known words, 12.5 % by chance" in page
    assert "Recall of words" in text
    other = edit(make_text_run(tmp_path / "dense", steps=60), "summary.json", recall=words)
    both = write_comparison([run, other], tmp_path / "c")
    said = both.read_text(encoding="utf-8") + both.with_suffix(".md").read_text(encoding="utf-8")
    assert "Recall of words" in said
    assert not any("facts" in shown.replace("guessing facts", "").lower() for shown in (text,))
    edit(other, "summary.json", recall=asked())
    mixed = write_comparison([run, other], tmp_path / "d").with_suffix(".md").read_text(encoding="utf-8")
    assert "Recall of facts and words" in mixed
