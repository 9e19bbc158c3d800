"""A new kind of source is one file and one line; what a run's settings mean to each kind."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import moekit
from moekit.data.sources import KINDS, Direction, Source, open_source, register_source, source_class
from moekit.errors import UserError
from moekit.runs.settings import DataConfig

PACKAGE = Path(moekit.__file__).parent
REGISTRY = PACKAGE / "data" / "sources" / "__init__.py"

FILE = '''
"""Every line and its mirror image."""

from pathlib import Path

from moekit.source import Direction, Source, digest, register_source


@register_source
class Mirror(Source):
    """One file of lines."""

    name = "mirror"

    def __init__(self, path, *, pivot="auto", directions=None, least=1):
        self.lines = [line for line in Path(path).read_text().splitlines() if len(line) >= least]
        self.languages = ("xx", "yy")
        self.directions = tuple(map(Direction.parse, directions or ["xx-yy"]))

    def parallel(self, direction, split):
        self.check_direction(direction)
        return [(line, line[::-1]) for line in self.lines] if split == "train" else []

    def fingerprint(self):
        return digest(self.name, *self.lines)
'''
LINE = "from mirror import Mirror as Mirror"


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of text; the kind of source that reads it is one file, and one line as in the registry."""
    known = dict(KINDS)
    (tmp_path / "mirror.py").write_text(FILE)
    (tmp_path / "text").write_text("one\nthree\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mirror", raising=False)
    exec(LINE, {})
    yield tmp_path / "text"
    KINDS.clear()
    KINDS.update(known)


def test_it_is_opened_by_its_name(mirror: Path) -> None:
    source = open_source("mirror", mirror, least=4)
    assert source.parallel(Direction("xx", "yy"), "train") == [("three", "eerht")]
    assert open_source("union", f"babel:,mirror:{mirror}", babel={"languages": 2}).languages == (
        "avl",
        "tnd",
        "xx",
        "yy",
    )
    with pytest.raises(
        UserError, match=r"mirror: settings.*got 'leest'\. Did you mean 'least'\? There are: directions, least, pivot\."
    ):
        open_source("mirror", mirror, leest=4)
    with pytest.raises(UserError, match="mirror: a path is required"):
        open_source("mirror")
    with pytest.raises(UserError, match=r"got 'miror'\. Did you mean 'mirror'\?"):
        open_source("miror", mirror)


def test_it_is_opened_by_the_settings_of_a_run(mirror: Path) -> None:
    source = DataConfig(source="mirror", path=str(mirror), directions="yy-xx").open()
    assert [str(direction) for direction in source.directions] == ["yy-xx"]
    both = DataConfig(source="mirror,babel", path=str(mirror), babel_languages=2).open()
    assert both.languages == ("xx", "yy", "avl", "tnd")


def names(path: Path) -> set[str]:
    """Names that a file uses or imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name) | ast.alias(name=name):
                found.add(name)
    return found


MADE_OF_BABEL = {PACKAGE / "babel" / "__init__.py", PACKAGE / "babel" / "headlines.py"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_one_file_and_one_line(kind: str) -> None:
    """Nothing in the rooms of text knows a kind but its own file, and one line of the registry."""
    made = source_class(kind)
    own = PACKAGE.parent / Path(*made.__module__.split(".")).with_suffix(".py")
    rooms = [path for room in ("source", "data", "babel") for path in (PACKAGE / room).rglob("*.py")]
    elsewhere = {path for path in rooms if made.__name__ in names(path)} - {own, REGISTRY}
    assert elsewhere <= (MADE_OF_BABEL if own.parent.name == "babel" else set())
    lines = [line for line in REGISTRY.read_text(encoding="utf-8").splitlines() if made.__name__ in line.split()]
    assert len(lines) == 1


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'moses' is that of Moses"):

        @register_source
        class Other(Source):
            name = "moses"

    assert source_class("moses").__name__ == "Moses"


GIVEN: dict[str, Any] = {
    "source": "any", "path": "somewhere", "pivot": "auto", "directions": ("avl-tnd",), "max_languages": 7,
    "babel_languages": 3, "babel_sentences": 40, "babel_sizes": {"kmb": 20}, "seed": 5, "vocab_size": 100,
    "facts_entities": 50, "facts_relations": 3, "facts_values": 10, "facts_power": 1.0, "facts_one_language": 0.2,
    "facts_profiles": 0.5, "babel_concepts": 90, "babel_cognates": 0.5,
}  # fmt: skip
"""Settings of a run by their names."""
ALIGNED = {"pivot": "auto", "directions": ("avl-tnd",)}


@pytest.mark.parametrize(
    ("kind", "taken", "needs_path"),
    [
        (
            "babel",
            {
                "languages": 3,
                "train_sentences": 40,
                "sizes": {"kmb": 20},
                "seed": 4,
                "directions": ("avl-tnd",),
                "concepts": 90,
                "cognates": 0.5,
            },
            False,
        ),
        (
            "headlines",
            {
                "languages": 3,
                "train_documents": 40,
                "seed": 4,
                "directions": ("avl-tnd",),
                "concepts": 90,
                "cognates": 0.5,
            },
            False,
        ),
        (
            "facts",
            {
                "languages": 3,
                "train_sentences": 40,
                "seed": 4,
                "directions": ("avl-tnd",),
                "entities": 50,
                "relations": 3,
                "values": 10,
                "power": 1.0,
                "one_language": 0.2,
                "profiles": 0.5,
            },
            False,
        ),
        ("gettext", {**ALIGNED, "max_languages": 7}, False),
        ("moses", ALIGNED, True),
        ("jsonl", ALIGNED, True),
        ("tsv", ALIGNED, True),
        ("text", {}, True),
    ],
)
def test_what_each_kind_takes_of_the_settings_of_a_run(kind: str, taken: dict[str, Any], needs_path: bool) -> None:
    made = source_class(kind)
    assert made.settings_from(GIVEN) == taken
    assert made.needs_path() == needs_path
    assert set(taken) <= set(made.parameters())


def test_babel_as_a_run_opens_it_is_babel_by_its_arguments() -> None:
    config = DataConfig(
        babel_sentences=40, babel_languages=3, babel_sizes="kmb=20", babel_concepts=90, babel_cognates=0.5, seed=5
    )
    for kind in ("babel", "headlines"):
        by_run = DataConfig(**{**vars(config), "source": kind}).open()
        by_name = open_source(kind, **source_class(kind).settings_from({**GIVEN, "directions": None}))
        assert by_name.fingerprint() == by_run.fingerprint()
