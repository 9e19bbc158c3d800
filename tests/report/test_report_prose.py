"""texts.toml: whatever is in it is used, every place that is filled in is filled in, and nothing else is asked for."""

import re
import string
from pathlib import Path

import pytest

import moekit.report
from moekit.report.view import caption, heading, texts

CODE = "\n".join(path.read_text() for path in Path(moekit.report.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(("group", "call"), [("figures", "caption"), ("sections", "heading")])
def test_every_text_is_asked_for_by_name(group: str, call: str) -> None:
    asked = set(re.findall(rf'{call}\(\s*"(\w+)"', CODE))
    asked |= set(re.findall(r'"(compared_\w+)"', CODE)) if group == "sections" else set()
    assert asked == set(texts()[group])
    assert len(asked) > 8


def test_texts_have_their_parts() -> None:
    assert all(len(parts) == 3 and all(parts) for parts in texts()["routing"].values())
    assert all(len(parts) == 3 and all(parts[:2]) for parts in texts()["figures"].values())
    assert all(len(parts) == 4 and all(parts) for parts in texts()["sections"].values())


def test_places_are_filled_in() -> None:
    assert caption("languages", task=": {odd}")[0] == "Perplexity by language: {odd}"
    assert caption("speed", worry=False)[2] == ""
    assert heading("prediction", blind=" Blind.")[3].endswith("lower is better. Blind.")
    with pytest.raises(KeyError, match="blind"):
        heading("prediction")
    prose = [text for parts in texts()["figures"].values() for text in parts]
    fields = {name for text in prose for _, name, _, _ in string.Formatter().parse(text)}
    assert fields - {None} == {
        "metric",
        "pivot",
        "task",
        "origin",
        "cut",
        "used",
        "title",
        "kind",
        "side",
        "measured",
        "left_out",
    }
