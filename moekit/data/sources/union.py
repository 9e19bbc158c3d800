"""Several sources as one: what is called the same language is the same language."""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from inspect import Parameter, signature
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from moekit.data.sources.streamed import each_once
from moekit.errors import UserError, nearest
from moekit.source import (
    KINDS,
    Direction,
    LazySequence,
    Source,
    Split,
    UnservedDirectionError,
    choose_directions,
    digest,
    open_source,
    register_source,
)

_T = TypeVar("_T")


@register_source
class Union(Source):
    """All text of several sources: Multi30k and MAFAND together, or parallel text and monolingual text.

    Languages and directions come in the order of the members, each once; a direction that several members serve is
    one after the other. Members are not compared: a sentence may be training text in one and test text in another.

    Args:
        members: the sources.
        wanted: directions that must be of some member; None = whatever there are.

    Raises:
        UserError: if there is no member, or none has one of these directions.
    """

    name = "union"

    def __init__(self, members: Sequence[Source], wanted: Sequence[str] | None = None) -> None:
        if not members:
            raise UserError("union: at least one source is required: got none.")
        self.members = tuple(members)
        self._each_once: dict[tuple[str, Split], Sequence[str]] = {}
        self.languages = tuple(dict.fromkeys(code for member in members for code in member.languages))
        self.directions = tuple(dict.fromkeys(direction for member in members for direction in member.directions))
        if wanted is not None:
            choose_directions(self.directions, wanted=tuple(wanted))

    @classmethod
    def parameters(cls) -> Mapping[str, Parameter]:
        """A path; settings are those of the members."""
        return signature(cls.open).parameters

    @classmethod
    def open(cls, path: str | Path | None = None, **settings: Any) -> Union:
        """Open every member.

        Args:
            path: the members, as ``moses:path/one,jsonl:path/two``.
            settings: a mapping of settings by kind of member, as ``moses={"pivot": "en"}``.

        Raises:
            UserError: no members, or settings of something else; whatever is wrong with a member.
        """
        # A comma ends a member where the name of a kind follows; others are part of a path.
        comma = re.compile(rf",(?=\s*(?:{'|'.join(map(re.escape, KINDS))})\s*(?:[:,]|$))")
        members = [part.partition(":") for part in comma.split(str(path or "")) if part.strip()]
        kinds = [kind.strip() for kind, _, _ in members]
        if not members or not all(kinds):
            raise UserError(
                "union: the path must name the members as kind:path,kind:path, for example "
                f"moses:data/one,jsonl:data/two: got {path!r}."
            )
        for name, value in settings.items():
            if name not in kinds:
                raise UserError(f"union: settings must belong to a member: got {name!r}. {nearest(name, set(kinds))}")
            if not isinstance(value, Mapping):
                raise UserError(f"union: the settings of {name} must be a mapping: got {type(value).__name__}.")
        places = [where.strip() or None for _, _, where in members]
        return cls(
            [open_source(kind, place, **settings.get(kind, {})) for kind, place in zip(kinds, places, strict=True)]
        )

    def parallel(self, direction: Direction, split: Split) -> Sequence[tuple[str, str]]:
        """Pairs of every member that serves the direction, one member after the other."""
        self.check_direction(direction)
        return _chain([m.parallel(direction, split) for m in self.members if direction in m.directions])

    def monolingual(self, language: str, split: Split) -> Sequence[str]:
        """Sentences of every member that holds the language, each once."""
        self.check_language(language)
        holders = [member for member in self.members if language in member.languages]
        if len(holders) == 1:
            return holders[0].monolingual(language, split)
        if (language, split) not in self._each_once:
            self._each_once[language, split] = each_once([member.monolingual(language, split) for member in holders])
        return self._each_once[language, split]

    def prepare(self, cache: Path, *, progress: bool = True) -> None:
        """Prepare every member."""
        for member in self.members:
            member.prepare(cache, progress=progress)

    def salient(self, language: str) -> frozenset[str] | None:
        """The salient words of every member that knows of some."""
        self.check_language(language)
        found = [member.salient(language) for member in self.members if language in member.languages]
        known = [words for words in found if words is not None]
        return frozenset().union(*known) if known else None

    def fingerprint(self) -> str:
        """Digest of the members' fingerprints, in order."""
        return digest("union", *(member.fingerprint() for member in self.members))


def _chain(parts: Sequence[Sequence[_T]]) -> Sequence[_T]:
    """Sequences one after the other, without copying them."""
    starts = list(accumulate(map(len, parts), initial=0))

    def item(index: int) -> _T:
        part = bisect.bisect_right(starts, index) - 1
        return parts[part][index - starts[part]]

    return LazySequence(starts[-1], item)


def open_part(made: type[Source], path: str | None, given: Mapping[str, Any], *, alone: bool) -> Source:
    """A kind of data; one of several with those of the wanted directions that it has.

    Args:
        made: its class.
        path: where it lies, if it lies anywhere.
        given: settings of a run by name, ``directions`` among them.
        alone: whether it is all that the run reads.

    Raises:
        UserError: it has none of the directions, or whatever is wrong with the data; naming the kind.
    """
    wanted = given["directions"]
    if alone or wanted is None or "directions" not in made.parameters():
        return made.open(path, **made.settings_from(given))

    def opened(directions: Sequence[Direction] | None) -> Source:
        only = None if directions is None else tuple(map(str, directions))
        return made.open(path, **made.settings_from({**given, "directions": only}))

    found = opened(None)
    every = [Direction.parse(way, itself=True) for way in wanted]
    own = [way for way in every if {way.source, way.target} <= {*found.languages}]
    own = [way for way in own if way.source != way.target or way in found.directions]
    try:
        try:  # a kind with none of them knows what it has
            return opened(own or every)
        except UnservedDirectionError as error:  # it has both languages, in text of its own each
            if served := [way for way in own if way in error.available]:
                return opened(served)
            raise
    except UserError as error:
        raise UserError(f"data.source {made.name}: {error}") from None
