"""Inputs and targets from JSON lines and from TSV: the same pairs, and what is wrong is said with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from moekit.data.sources import Direction, Examples, open_source
from moekit.errors import UserError

ROWS = [("is it good? a fine film", "yes"), ("is it good? a dull one", "no"), ("sum: 1 2", "3")]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def as_json(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"input": a, "target": b, "id": 3}) + "\n" for a, b in rows)


def as_tsv(rows: list[tuple[str, str]]) -> str:
    return "target\tid\tinput\n" + "".join(f"{b}\t3\t{a}\n" for a, b in rows)


@pytest.mark.parametrize(
    ("name", "form"), [("train.jsonl", as_json), ("train.tsv", as_tsv), ("train.json.gz", as_json)]
)
def test_pairs_of_a_pseudo_direction(tmp_path: Path, name: str, form: type) -> None:
    folder = write(tmp_path / "data", name, form(ROWS))
    write(folder, "test" + name.removeprefix("train"), form(ROWS[:1]))
    source = open_source("examples", folder)
    (direction,) = source.directions
    assert (str(direction), source.languages) == ("en-en", ("en",))
    assert list(source.parallel(direction, "train")) == ROWS
    assert list(source.parallel(direction, "test")) == ROWS[:1]
    assert list(source.parallel(direction, "valid")) == []
    assert source.monolingual("en", "train") == [text for row in ROWS for text in row]
    assert source.fingerprint() == Examples(folder).fingerprint()
    assert source.fingerprint() != Examples(folder, directions=["de-de"]).fingerprint()
    write(folder, name, form(ROWS[:2]))
    assert source.fingerprint() != Examples(folder).fingerprint()


def test_inputs_and_targets_may_be_of_two_languages(tmp_path: Path) -> None:
    source = Examples(write(tmp_path / "data", "train.jsonl", as_json(ROWS)), directions=["en-pt_BR"])
    assert source.directions == (Direction("en", "pt_BR"),)
    assert source.monolingual("pt_BR", "train") == ["yes", "no", "3"]


def test_white_space_is_one_space(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "train.jsonl", json.dumps({"input": "a\nb\u2028 c ", "target": "d"}) + "\n\n")
    assert list(Examples(folder).parallel(Direction("en", "en"), "train")) == [("a b c", "d")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", '{"input": "a", "target": "b"}\n{"input": "a"}\n', r"train\.jsonl, line 2: .*input and target"),
        ("train.jsonl", '{"input": "a", "target": 3}\n', r"line 1: .*texts input and target"),
        ("train.jsonl", '[{"input": "a"}]\n', r"line 1: .*must be an object"),
        ("train.jsonl", '{"input": \n', r"line 1, column 11: the line must be JSON"),
        ("train.jsonl", '{"input": "a", "target": " "}\n', r"line 1: input and target must not be empty"),
        ("train.jsonl", "\n", "at least one example"),
        ("train.tsv", "input\toutput\na\tb\n", r"train\.tsv, line 1: .*input and target once each"),
        ("train.tsv", "input\ttarget\na\tb\tc\n", r"line 2: .*as many fields as the first, 2 .*got 3"),
        ("train.tsv", "input\ttarget\n", "at least one example"),
        ("other.jsonl", "", "files must be named train.jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Examples(write(tmp_path / "data", name, text))


@pytest.mark.parametrize(("directions", "message"), [(["en-en", "de-de"], "one direction"), (["en"], "two language")])
def test_bad_directions_are_refused(tmp_path: Path, directions: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Examples(write(tmp_path / "data", "train.jsonl", as_json(ROWS)), directions=directions)
