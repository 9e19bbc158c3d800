"""Files of examples by split, and which examples of a single file are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moekit.data.lines import read_lines
from moekit.data.sources.files import find_split_files, read_json, unpacked_name
from moekit.data.sources.jsonl import ENDINGS, KEY
from moekit.folder_text.examples import HELD_OUT, SEED, Example, divided, read_examples
from moekit.source import Split

Files = Sequence[tuple[Split, Path]]


def kind_of_file(path: str) -> Literal["jsonl", "text"]:
    """The kind of source that a file's name tells: JSON lines by its ending, else text."""
    return "jsonl" if unpacked_name(Path(path)).endswith(ENDINGS) else "text"


def example_files(source: str, path: str | None) -> Files | None:
    """The files of a kind of source and a path that hold examples; None where they hold text of another form.

    Examples are in JSON lines, but for those of translations, and in a single file with a text a line.

    Raises:
        UserError: a file of JSON lines cannot be read, or there is none.
    """
    if path is None or source not in ("jsonl", "text"):
        return None
    if source == "text":
        return [("train", Path(path))] if Path(path).is_file() else None
    files = find_split_files(Path(path), "jsonl", ENDINGS)
    return None if _translates(files[0][1]) else files


def split_examples(files: Files, source: Literal["jsonl", "text"], split: Split) -> list[Example]:
    """The examples of a split.

    Where no file is of validation text, a share of the training examples is held out: `HELD_OUT` of them by the seed
    `SEED`, which are those that fine-tuning on the same file holds out unless it is told otherwise.

    Raises:
        UserError: a file cannot be read, or a line is no example.
    """
    own = [example for of, file in files if of == split for example in read_examples(str(file), source)]
    if split == "test" or any(of == "valid" for of, _ in files):
        return own
    training = own or [example for of, file in files if of == "train" for example in read_examples(str(file), source)]
    if len(training) < 2:
        return own
    return divided(training, HELD_OUT, SEED)[split == "valid"]


def _translates(file: Path) -> bool:
    """Whether the first line of a file is a translation; a line that cannot be read is for its reader to refuse."""
    for number, line in enumerate(read_lines(str(file), "--data.path"), start=1):
        if line.strip():
            row = read_json(line, f"{file}, line {number}")
            return isinstance(row, dict) and KEY in row
    return False
