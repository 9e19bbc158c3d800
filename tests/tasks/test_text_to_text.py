"""Text to text: its scores beside loops over examples, and fine-tuning to the end from the command line."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from pathlib import Path

import pytest

from moekit.cli.recipes import main
from moekit.recipes.switch import RECIPE
from moekit.tasks.text_to_text import TextToTextScore

PAIRS = [
    ("The cat sat.", "a cat sat"),
    ("yes", "no"),
    ("", "nothing was said"),
    ("Paris, the capital", "Paris is the capital of France"),
    ("the", "an"),  # nothing is left of either
    ("one two two three", "two two one three three"),
]


def words(text: str) -> list[str]:
    """evaluate-v1.1.py of SQuAD: lower case, punctuation, articles, white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(said: list[str], right: list[str]) -> float:
    common = sum((Counter(said) & Counter(right)).values())
    if not said or not right:
        return float(said == right)
    return 2 * common / (len(said) + len(right))


def runs(text: str, n: int) -> list[tuple[str, ...]]:
    pieces = re.findall("[a-z0-9]+", text.lower())
    return [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)]


def rouge(said: str, right: str, n: int) -> float:
    a, b = Counter(runs(said, n)), Counter(runs(right, n))
    return 2 * sum((a & b).values()) / max(1, a.total() + b.total())


def rouge_l(said: str, right: str) -> float:
    a, b = runs(said, 1), runs(right, 1)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return 2 * table[-1][-1] / max(1, len(a) + len(b))


def expected(pairs: list[tuple[str, str]]) -> dict[str, float]:
    rows = [
        {
            "exact_match": float(words(a) == words(b)),
            "f1": f1(words(a), words(b)),
            "rouge1": rouge(a, b, 1),
            "rouge2": rouge(a, b, 2),
            "rougeL": rouge_l(a, b),
        }
        for a, b in pairs
    ]
    return {name: 100 * sum(row[name] for row in rows) / len(rows) for name in rows[0]}


@pytest.mark.parametrize("sizes", [[6], [1, 2, 3], [1] * 6])
def test_scores_are_those_of_a_loop_however_examples_are_batched(sizes: list[int]) -> None:
    score = TextToTextScore(["en-en", "en-de"])
    rest = list(PAIRS)
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        score.update("en-en", [a for a, _ in part], [b for _, b in part])
    found = score.compute()
    for name, value in expected(PAIRS).items():
        assert found[name]["directions"] == {"en-en": pytest.approx(value, rel=1e-5)}, name
        assert found[name]["average"] == pytest.approx(value, rel=1e-5)
        assert score.log_values()[f"{name}/en-en"] == pytest.approx(value, rel=1e-5)


def test_the_average_is_over_directions_that_were_tested() -> None:
    score = TextToTextScore(["en-en", "en-de", "de-de"])
    score.update("en-en", ["yes"], ["yes"])
    score.update("de-de", ["ja", "ja"], ["ja", "nein"])
    assert score.compute()["exact_match"]["average"] == pytest.approx(75)
    assert score.compute()["exact_match"]["directions"] == {"en-en": 100.0, "de-de": 50.0}


SMALL = [
    "--data.babel_sentences", "400", "--data.babel_languages", "2", "--data.vocab_size", "700",
    "--model.dim", "32", "--model.hidden_dim", "64", "--model.num_experts", "2",
    "--train.max_steps", "4", "--train.max_minutes", "0", "--train.warmup_steps", "1", "--train.validate_every", "0",
    "--evaluate.max_sentences", "8", "--evaluate.valid_sentences", "8", "--evaluate.samples", "2",
]  # fmt: skip


def test_a_run_is_fine_tuned_on_examples_and_reports_their_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether a sentence is long, asked of a Switch model that was trained on span corruption."""
    base, out, cache = tmp_path / "base", tmp_path / "tuned", ["--data.cache", str(tmp_path / "cache")]
    assert main(RECIPE, ["run", "--out", str(base), *SMALL, *cache, "--tasks.span_corruption.tokens", "512"]) == 0
    assert "text_to_text" not in (base / "config.yaml").read_text()
    texts = [sample["source"] for sample in json.loads((base / "samples.json").read_text())]
    language = json.loads((base / "summary.json").read_text())["data"]["languages"][0]
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 40), ("valid", 8), ("test", 8)):
        lines = [
            json.dumps({"input": f"{texts[i % len(texts)]} {i}", "target": texts[0].split()[i % 2]})
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = [
        "--init_from", str(base), "--data.source", "examples", "--data.path", str(folder),
        "--data.directions", f"{language}-{language}", "--tasks.text_to_text.tokens", "512",
        "--tasks.span_corruption.tokens", "0", "--train.max_steps", "3", "--train.warmup_steps", "1",
        "--train.validate_every", "0", "--evaluate.beam_size", "1",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(RECIPE, ["finetune", "--out", str(out), *arguments, *cache]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    samples = json.loads((out / "samples.json").read_text())
    direction = f"{language}-{language}"
    assert [sample["task"] for sample in samples] == ["text_to_text"] * 2
    for name in ("exact_match", "f1", "rouge1", "rouge2", "rougeL"):
        assert 0 <= summary["scores"][name]["average"] <= 100
        assert list(summary["scores"][name]["directions"]) == [direction]
    assert (summary["bleu"], summary["test"]) == (None, {})
    assert summary["perplexity"]["text_to_text"] == pytest.approx(math.exp(summary["loss"]["text_to_text"]))
    assert summary["tasks"]["text_to_text"]["scores"]["rougeL"] == "ROUGE-L"
    page = (out / "report.html").read_text()
    assert "Text to text" in page
    assert "Sample answers" in page
    for label in ("Exact match", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L"):
        assert label in page
        assert label in shown
