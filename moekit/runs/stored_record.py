"""Plain data with names, as files hold it: what all records have in common."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

VERSION = 1
"""Of the records, by their key ``version``; one without it is of version 1."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Plain data with names: fields that a file lacks, as one of an older version does, have their default."""

    @classmethod
    def from_json(cls, data: Any, notes: list[str] | None = None) -> Self:
        """The record from what a file holds; further keys are left out.

        Args:
            data: what the file holds.
            notes: where given, a field of the wrong kind that has a default is noted here, and has its default.

        Raises:
            ValueError: it is no record, is of a later version, or a field is missing or of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a {cls.__name__} must be a mapping: got {type(data).__name__}.")
        version = data.get("version", VERSION)
        if version != VERSION:
            raise ValueError(f"a {cls.__name__} must be of version {VERSION}: got {version}.")
        hints, given = typing.get_type_hints(cls), {}
        for f in dataclasses.fields(cls):
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            try:
                if f.name in data:
                    given[f.name] = _made(hints[f.name], data[f.name], f.name, notes)
                elif required:
                    raise ValueError(f"{f.name} must be in a {cls.__name__}.")
            except ValueError as error:
                if required or notes is None:
                    raise
                notes.append(str(error))
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Plain data; an optional field that is None is left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        unsaid = {f.name for f in dataclasses.fields(self) if f.metadata.get("optional") and values[f.name] is None}
        return {name: _plain(value) for name, value in values.items() if name not in unsaid}


def _made(hint: Any, value: Any, name: str, notes: list[str] | None) -> Any:
    """The value as its field wants it; a record from a mapping, a list of records from a list of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value, notes)
    if origin is not None and type(None) in inner:
        return None if value is None else _made(next(i for i in inner if i is not type(None)), value, name, notes)
    kind = {float: (int, float)}.get(hint, origin or hint)
    if not isinstance(value, kind) or (origin is Sequence and isinstance(value, str)):
        raise ValueError(f"{name} must be {getattr(kind, '__name__', 'a number')}: got {type(value).__name__}.")
    if origin is Sequence and isinstance(inner[0], type) and issubclass(inner[0], Record):
        return [inner[0].from_json(item, notes) for item in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
