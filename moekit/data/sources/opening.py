"""One door to all kinds of source: `open_source("moses", "path/to/folder")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.errors import UserError, nearest
from moekit.source import KINDS, Source


def source_class(kind: str) -> type[Source]:
    """The class of a kind of source.

    Raises:
        UserError: no such kind, with the nearest name.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of source must be a known one: got {kind!r}. {nearest(kind, KINDS)}")
    return KINDS[kind]


def open_source(kind: str, path: str | Path | None = None, **settings: Any) -> Source:
    """Open a corpus of one of the `KINDS`.

    Args:
        kind: as a class of a source names it: babel (generated, needs no path), headlines (paragraphs of babel with
            their headlines), moses, jsonl, tsv, examples (inputs and targets),
            gettext (without a path: the system's catalogs), text, or union.
        path: where the corpus lies. For union the members, as ``moses:path/one,jsonl:path/two``.
        settings: arguments of that kind's class (`BabelSettings` for babel; for headlines those of `Headlines`, and
            others for its corpus). For union, a mapping of arguments by kind of member, as ``moses={"pivot": "en"}``.

    Raises:
        UserError: for an unknown kind or setting, with the nearest name; and for whatever is wrong with the data.
    """
    return source_class(kind).open(path, **settings)
