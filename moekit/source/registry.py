"""The kinds of source by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from moekit.errors import UserError, nearest
from moekit.source.base import Source

_Kind = TypeVar("_Kind", bound=type[Source])

KINDS: dict[str, type[Source]] = {}
"""Kinds of source by name, as `register_source` has been told of them."""


def register_source(kind: _Kind) -> _Kind:
    """Make a kind of source known by its `name`; a decorator of its class.

    Raises:
        ValueError: another class has that name.
    """
    other = KINDS.setdefault(kind.name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"a kind of source needs a name of its own: {kind.name!r} is that of {other.__qualname__}.")
    KINDS[kind.name] = kind
    return kind


def source_class(kind: str) -> type[Source]:
    """The class of a kind of source.

    Raises:
        UserError: no such kind, with the nearest name.
    """
    if kind not in KINDS:
        raise UserError(f"the kind of source must be a known one: got {kind!r}. {nearest(kind, KINDS)}")
    return KINDS[kind]


def require_parameter(kinds: Iterable[str], name: str) -> None:
    """Make sure that one of some kinds of source reads text by the setting `name`; what is generated has none.

    Raises:
        UserError: none does; those that do are named.
    """
    chosen, takes = list(kinds), [kind for kind, made in KINDS.items() if {"path", name} <= made.parameters().keys()]
    if not set(takes) & set(chosen):
        raise UserError(
            f"data.{name} is for text of the kinds {', '.join(takes)}: got data.source {','.join(chosen)}. Leave "
            "it out."
        )


def open_source(kind: str, path: str | Path | None = None, **settings: Any) -> Source:
    """Open a corpus of one of the `KINDS`, such as those of `moekit.data.sources`: ``open_source("moses", "folder")``.

    Args:
        kind: The name of a class of a source: babel (generated, needs no path), facts (facts in languages of babel),
            headlines (paragraphs of babel with their headlines), moses, jsonl, tsv, examples (inputs and targets),
            gettext (without a path: the system's catalogs), text, or union.
        path: where the corpus lies. For union the members, as ``moses:path/one,jsonl:path/two``.
        settings: arguments of that kind's class (`BabelSettings` for babel; for headlines those of `Headlines`, and
            others for its corpus). For union, a mapping of arguments by kind of member, as ``moses={"pivot": "en"}``.

    Raises:
        UserError: for an unknown kind or setting, with the nearest name; and for whatever is wrong with the data.
    """
    return source_class(kind).open(path, **settings)
