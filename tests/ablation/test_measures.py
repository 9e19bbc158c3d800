"""Numbers of a run by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moekit.ablation.measures import measure
from moekit.errors import UserError

SUMMARY = {
    "test": {"causal_lm": {"loss": 1.5}},
    "recall": [
        {
            "task": "causal_lm", "choices": 4, "chance": 0.25,
            "kinds": [{"kind": "known", "recall": 0.75, "questions": 8}, {"kind": "composed", "recall": 0.5}],
        },
        {
            "task": "causal_lm", "choices": 2, "chance": 0.5, "about": "agreement",
            "kinds": [{"kind": "verb", "recall": 0.875, "questions": 8}, {"kind": "verb_attractor", "recall": 0.625}],
        },
    ],
    "floors": [
        {"task": "causal_lm", "split": "valid", "knowing": 1.0, "guessing": 2.0},
        {"task": "causal_lm", "split": "test", "knowing": 1.25, "guessing": 2.5},
    ],
    "domains": [
        {"name": "talks", "task": "causal_lm", "sentences": 9, "loss": 2.0, "above_test": 0.5, "knowing": None,
         "guessing": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test.causal_lm.loss", 1.5),
        ("recall.causal_lm.known", 0.75),
        ("recall.causal_lm.composed", 0.5),
        ("recall.causal_lm.verb", 0.875),
        ("recall.causal_lm.verb - recall.causal_lm.verb_attractor", 0.25),
        ("floors.causal_lm.valid.guessing", 2.0),
        ("floors.causal_lm.test.knowing", 1.25),
        ("domains.talks.causal_lm.above_test", 0.5),
        ("recall.causal_lm.known - recall.causal_lm.composed", 0.25),
        ("recall.causal_lm.known + test.causal_lm.loss - recall.causal_lm.composed", 1.75),
    ],
)
def test_numbers_of_a_summary(key: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert measure(tmp_path, key) == value


@pytest.mark.parametrize("key", ["test.causal_lm.loss -", "test.causal_lm.loss * 2", "- test.causal_lm.loss"])
def test_what_is_no_sum_is_no_number(key: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    with pytest.raises(UserError, match="has no number"):
        measure(tmp_path, key)


def test_a_run_without_recall_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"recall": None, "floors": None, "loss": {"causal_lm": 1.0}}))
    with pytest.raises(UserError, match=r"has no number 'recall\.causal_lm\.known'.*It has loss\.causal_lm\."):
        measure(tmp_path, "recall.causal_lm.known")
