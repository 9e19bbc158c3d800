"""Datasets of Hugging Face as text: saved, as files, and streamed from Python."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moekit.data.sources import Datasets, open_source
from moekit.errors import UserError

datasets = pytest.importorskip("datasets")

ROWS = [f"row {i}\n\nand its second line" for i in range(700)]
SHARES: dict[str, Any] = {"valid_share": 0, "test_share": 0}


def train(source: Any, split: str = "train") -> list[str]:
    return list(source.monolingual("en", split))


def test_the_same_text_from_everywhere(tmp_path: Path) -> None:
    held = datasets.Dataset.from_dict({"text": ROWS, "id": list(range(len(ROWS)))})
    both = datasets.DatasetDict({"train": held, "validation": held.select(range(3))})
    both.save_to_disk(tmp_path / "saved")
    held.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    held.to_parquet(tmp_path / "files" / "train-0.parquet")
    held.select(range(3)).to_parquet(tmp_path / "files" / "validation-0.parquet")
    (tmp_path / "rows").mkdir()
    held.to_json(tmp_path / "rows" / "train.jsonl")
    sentences = [line for i in range(len(ROWS)) for line in (f"row {i}", "and its second line")]
    expected, valid = list(dict.fromkeys(sentences)), ["row 0", "and its second line", "row 1", "row 2"]
    found = {}
    for given, validation in (
        (tmp_path / "saved", valid), (tmp_path / "files", valid), (both, valid), (tmp_path / "one", []),
        (tmp_path / "rows", []), (held, []), (held.to_iterable_dataset(), []),
        ({"train": datasets.IterableDataset.from_generator(lambda: ({"text": row} for row in ROWS))}, []),
    ):  # fmt: skip
        source = open_source("datasets", given, languages=["en"], **SHARES)
        assert train(source) == train(source) == expected
        assert train(source, "valid") == validation
        found.setdefault(bool(validation), set()).add(source.fingerprint())
    assert [len(prints) for prints in found.values()] == [1, 1]  # of the content, wherever it lies
    whole = Datasets(held, languages=["en"], unit="document", **SHARES)
    assert train(whole)[:2] == ["row 0 and its second line", "row 1 and its second line"]
    drawn = Datasets(held, languages=["en"], unit="document")
    assert sum(len(train(drawn, split)) for split in ("train", "valid", "test")) == 700
    assert len(train(drawn, "valid")) > 0


def test_a_stream_must_not_change() -> None:
    turn = itertools.count()

    def rows() -> Iterator[dict[str, str]]:
        first = next(turn)
        yield from ({"text": f"{i + first} x"} for i in range(9))

    changing = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(UserError, match="the rows of train must be the same each time they are read: they differ"):
        train(Datasets(changing, languages=["en"], **SHARES))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ({"text": ["x"]}, {"languages": None}, r"one language must be named.*got none"),
        ({"text": ["x"]}, {"languages": ["en", "de"]}, r"got en, de"),
        ({"text": ["x"]}, {"unit": "word"}, "unit must be line, paragraph or document"),
        ({"text": ["x"]}, {"text_field": "body"}, r"in the column 'body': got the columns text\. data\.text_field"),
        ({"text": ["x", None]}, {}, r"row 2 of train must be text: got NoneType"),
        ({"text": ["x", "a\0"]}, {}, r"row 2 of train must be without NUL"),
        ({"text": [" ", "\n"]}, {}, r"the split train must hold text: all of its rows are empty"),
    ],
)
def test_what_is_wrong_with_rows(rows: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Datasets(datasets.Dataset.from_dict(rows), **{"languages": ["en"], **settings})


def test_what_is_wrong_with_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (
        (tmp_path / "away", "must be a folder: got nothing there"),
        (tmp_path, "must hold a dataset"),
        ({"unsupervised": datasets.Dataset.from_dict({"text": ["x"]})}, "splits must be called .* got 'unsupervised'"),
        ({"train": ["x"]}, "got 'train', list"),
        ({}, "must have a split: got none"),
    ):
        with pytest.raises(UserError, match=message):
            Datasets(given, languages=["en"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"the package datasets is required: install moekit\[datasets\]"):
        Datasets(tmp_path, languages=["en"])
