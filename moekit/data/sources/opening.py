"""One door to all kinds of source: `open_source("moses", "path/to/folder")`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moekit.babel import Babel, BabelSettings, Headlines
from moekit.data.sources.examples import Examples
from moekit.data.sources.gettext import DEFAULT_FOLDER, Gettext
from moekit.data.sources.jsonl import JsonLines
from moekit.data.sources.moses import Moses
from moekit.data.sources.text import Text
from moekit.data.sources.tsv import Tsv
from moekit.data.sources.union import Union
from moekit.errors import UserError, nearest
from moekit.source import Source

KINDS = ("babel", "headlines", "moses", "jsonl", "tsv", "examples", "gettext", "text", "union")


def open_source(kind: str, path: str | Path | None = None, **settings: Any) -> Source:
    """Open a corpus of one of the `KINDS`.

    Args:
        kind: babel (generated, needs no path), headlines (paragraphs of babel with their headlines), moses, jsonl, tsv,
            examples (inputs and targets), gettext (without a path: the system's catalogs), text, or union.
        path: where the corpus lies. For union the members, as ``moses:path/one,jsonl:path/two``.
        settings: arguments of that kind's class (`BabelSettings` for babel; for headlines those of `Headlines`, and
            others for its corpus). For union, a mapping of arguments by
            kind of member, as ``moses={"pivot": "en"}``.

    Raises:
        UserError: for an unknown kind or setting, with the nearest name; and for whatever is wrong with the data.
    """
    match kind:
        case "babel" | "headlines":
            if path is not None:
                raise UserError(f"{kind}: the corpus is generated and has no path: got {path}. Leave the path out.")
            known = tuple(field.name for field in dataclasses.fields(BabelSettings))
            if kind == "babel":
                return Babel(BabelSettings(**_checked(kind, settings, known)))
            own = tuple(name for name in inspect.signature(Headlines).parameters if name != "corpus")
            _checked(kind, settings, (*own, *known))
            corpus = Babel(BabelSettings(**{name: value for name, value in settings.items() if name not in own}))
            return Headlines(corpus, **{name: value for name, value in settings.items() if name in own})
        case "gettext":
            return _open(Gettext, kind, DEFAULT_FOLDER if path is None else path, settings)
        case "moses":
            return _open(Moses, kind, path, settings)
        case "jsonl":
            return _open(JsonLines, kind, path, settings)
        case "tsv":
            return _open(Tsv, kind, path, settings)
        case "examples":
            return _open(Examples, kind, path, settings)
        case "text":
            return _open(Text, kind, path, settings)
        case "union":
            return _open_union(path, settings)
        case _:
            raise UserError(f"the kind of source must be a known one: got {kind!r}. {nearest(kind, KINDS)}")


def _open(make: Callable[..., Source], kind: str, path: str | Path | None, settings: Mapping[str, Any]) -> Source:
    if path is None:
        raise UserError(f"{kind}: a path is required: got none. Say where the corpus lies.")
    known = tuple(name for name in inspect.signature(make).parameters if name != "path")
    return make(path, **_checked(kind, settings, known))


def _checked(kind: str, settings: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    for name in settings:
        if name not in known:
            raise UserError(f"{kind}: settings must be known ones: got {name!r}. {nearest(name, known)}")
    return dict(settings)


def _open_union(path: str | Path | None, settings: Mapping[str, Any]) -> Source:
    members = [part.partition(":") for part in str(path or "").split(",") if part.strip()]
    kinds = [kind.strip() for kind, _, _ in members]
    if not members or not all(kinds):
        raise UserError(
            f"union: the path must name the members as kind:path,kind:path, for example moses:data/one,jsonl:data/two: "
            f"got {path!r}."
        )
    for name, value in settings.items():
        if name not in kinds:
            raise UserError(f"union: settings must belong to a member: got {name!r}. {nearest(name, set(kinds))}")
        if not isinstance(value, Mapping):
            raise UserError(f"union: the settings of {name} must be a mapping: got {type(value).__name__}.")
    return Union(
        [
            open_source(kind.strip(), where.strip() or None, **settings.get(kind.strip(), {}))
            for kind, _, where in members
        ]
    )
