"""Comparisons say which settings differ, and whether a difference in BLEU is luck, or why nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_runs import edit, make_run, summary_of
from sacrebleu.metrics.bleu import BLEU

from moekit.report import write_comparison
from moekit.report.significance import paired_bootstrap
from moekit.runs.record import TRANSLATIONS, read_written, write_written

REFERENCES = [f"the {i} dogs see a tree near river number {i * 7}" for i in range(60)]
GOOD = [text if i % 3 else text.replace("tree", "house") for i, text in enumerate(REFERENCES)]
BAD = [text if i % 4 == 0 else text.replace("dogs see", "cats hear") for i, text in enumerate(REFERENCES)]


def test_it_is_the_bootstrap_of_the_obvious_code() -> None:
    """Draws of sentences with sacrebleu's seed, and of each draw the BLEU of a corpus, one after the other."""
    found = paired_bootstrap(REFERENCES, GOOD, BAD)
    bleu = BLEU(force=True)

    def score(texts: list[str], rows: list[int]) -> float:
        return bleu.corpus_score([texts[i] for i in rows], [[REFERENCES[i] for i in rows]]).score

    assert found.scores == pytest.approx([score(texts, [*range(60)]) for texts in (GOOD, BAD)])
    draws = np.random.default_rng(12345).choice(60, size=(1000, 60), replace=True).tolist()
    drawn = sorted(score(BAD, rows) for rows in draws)
    assert found.means[1] == pytest.approx(np.mean(drawn), abs=1e-3)
    assert found.intervals[1] == pytest.approx((drawn[974] - drawn[25]) / 2, abs=1e-3)
    assert found.p == pytest.approx(1 / 1001)  # no draw is as far from the mean difference as that is from none
    assert found == paired_bootstrap(REFERENCES, GOOD, BAD)


def test_runs_that_write_the_same_do_not_differ() -> None:
    assert paired_bootstrap(REFERENCES, GOOD, GOOD).p == 1.0
    nearly = [*GOOD[:-1], "the 59 dogs see a tree near a river number 413"]
    assert paired_bootstrap(REFERENCES, GOOD, nearly).p > 0.2


def run_of(folder: Path, hypotheses: list[str], references: Sequence[str] = REFERENCES) -> Path:
    run = make_run(folder, steps=30)
    rows = [(i, *pair) for i, pair in enumerate(zip(references, hypotheses, strict=True))]
    write_written(run / TRANSLATIONS, {"translation": {"en-de": rows[:30], "de-en": rows[30:]}})
    assert read_written(run / TRANSLATIONS)["translation"]["de-en"] == rows[30:]
    return run


def compared(*runs: Path) -> str:
    return write_comparison(runs, runs[0].parent / "c.html").with_suffix(".md").read_text(encoding="utf-8")


def test_a_comparison_has_the_test(tmp_path: Path) -> None:
    text = compared(run_of(tmp_path / "good", GOOD), run_of(tmp_path / "bad", BAD))
    rows = [line for line in text.splitlines() if "±" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| all sentences", "| en-de", "| de-en"]
    assert rows[0].endswith("| 0.001 |")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Is the difference luck?" in page
    assert page.count("±") >= 6


def test_each_direction_is_split_as_it_was_scored(tmp_path: Path) -> None:
    """Chinese by 13a is a word a sentence; and text that is split in two ways has no BLEU of all of it."""
    chinese = ["三只小狗看见河边的绿房子。", "我们明天去看海。"] * 15
    others = [text.replace("河边", "水边") for text in chinese]
    runs = []
    for name, english, written in (("good", GOOD, chinese), ("bad", BAD, others)):
        run = make_run(tmp_path / name, steps=30)
        signature = "nrefs:1|tok:13a|v:2; nrefs:1|tok:zh|v:2 (into fr, zh)"
        edit(run, "summary.json", bleu={**summary_of(run)["bleu"], "signature": signature})
        rows = {
            "en-de": [(i, *pair) for i, pair in enumerate(zip(REFERENCES[:30], english[:30], strict=True))],
            "en-zh": [(i, *pair) for i, pair in enumerate(zip(chinese, written, strict=True))],
        }
        write_written(run / TRANSLATIONS, {"translation": rows})
        runs.append(run)
    rows = [line for line in compared(*runs).splitlines() if "±" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| en-de", "| en-zh"]
    assert rows[1].split(" | ")[1].startswith("100.0")
    assert rows[1].split(" | ")[2].startswith(f"{BLEU(tokenize='zh').corpus_score(others, [chinese]).score:.1f}")
    edit(runs[0], "summary.json", bleu={**summary_of(runs[0])["bleu"], "signature": "nrefs:1|tok:klingon"})
    edit(runs[1], "summary.json", bleu={**summary_of(runs[1])["bleu"], "signature": "nrefs:1|tok:klingon"})
    compared(*runs)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "No paired test of good and bad: sacrebleu here has no tokenizer klingon" in page


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sentences", "No paired test of good and other: the test sentences of en-de differ."),
        ("directions", "No paired test of good and other: they were tested in different directions."),
        ("signature", "No paired test of good and other: the signatures of BLEU differ: "),
        ("missing", "other has no translations.json.gz, which the command test writes."),
        ("broken", "other has no translations.json.gz, which the command test writes."),
    ],
)
def test_runs_that_cannot_be_paired_are_refused_by_name(kind: str, message: str, tmp_path: Path) -> None:
    good = run_of(tmp_path / "good", GOOD)
    changed = [f"{text}." for text in REFERENCES]
    other = run_of(tmp_path / "other", BAD, changed if kind == "sentences" else REFERENCES)
    if kind == "directions":
        write_written(other / TRANSLATIONS, {"translation": {"en-fr": [(0, "a", "b")]}})
    elif kind == "signature":
        edit(other, "summary.json", bleu={**summary_of(other)["bleu"], "signature": "nrefs:1|tok:zh"})
    elif kind == "missing":
        (other / TRANSLATIONS).unlink()
    elif kind == "broken":
        (other / TRANSLATIONS).write_bytes(b"no gzip")
    write_comparison([good, other], tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert message in page
    assert "± " not in page.replace("± is half", "")


def test_settings_that_differ_are_a_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=20) for name in ("one", "two", "three")]
    for run, rate, kinds in zip(runs, (0.001, 0.001, 0.5), (["a"], ["a", "b"], ["a"]), strict=True):
        settings = {"recipe": "zcode_m3", "train": {"learning_rate": rate, "seed": 7}, "data": {"source": kinds}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    text = compared(*runs)
    assert "| train.learning\\_rate | 0.001 | 0.001 | 0.5 |" in text
    assert "| data.source | a | a, b | a |" in text
    assert "train.seed" not in text
    (runs[0] / "config.yaml").write_text("{broken")
    assert "| train.seed | \u2013 | 7 | 7 |" in compared(*runs)


def test_equal_runs_have_no_table_of_settings(tmp_path: Path) -> None:
    text = compared(make_run(tmp_path / "one", steps=20), make_run(tmp_path / "two", steps=20))
    assert "Settings that differ" not in text
