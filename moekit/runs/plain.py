"""Configurations as plain data, as files and checkpoints hold them, and what differs between two."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from moekit.errors import UserError

C = TypeVar("C")


def with_setting(config: C, key: str, value: Any) -> C:
    """The configuration with the value at a dotted key replaced."""
    name, _, rest = key.partition(".")
    inner = with_setting(getattr(config, name), rest, value) if rest else value
    some: Any = config
    return dataclasses.replace(some, **{name: inner})


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested plain data, as YAML and checkpoints hold it, without tasks on offer that none chose."""
    values: dict[str, Any] = plain(dataclasses.asdict(config))
    tasks = getattr(config, "tasks", None)
    for f in () if tasks is None else dataclasses.fields(tasks):
        if f.metadata.get("offered") and getattr(tasks, f.name) == type(getattr(tasks, f.name))():
            del values["tasks"][f.name]
    return values


def build(cls: type[C], values: Any) -> C:
    """The dataclass `cls` from parsed values or plain data, nested dataclasses and mappings of them included.

    Raises:
        KeyError: a setting without a default is missing.
    """
    hints = typing.get_type_hints(cls)
    known = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = (f.default, f.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if f.name in values or not has_default:  # a run of an older version lacks the settings that came later
            known[f.name] = _coerce(hints[f.name], values[f.name])
    return cls(**known)


def _coerce(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(value)
    return value


def plain(data: Any) -> Any:
    """Mappings, sequences and paths as dictionaries, lists and strings; numbers and strings as they are.

    Raises:
        TypeError: anything else.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    raise TypeError(f"A configuration must be plain data: got {type(data).__name__} ({data!r}).")


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; a missing one is None.

    Settings that have one of the keys `free`, or are in a group that has, are left out.
    """
    one, other = flatten(plain(saved)), flatten(plain(current))
    pairs = {key: (one.get(key), other.get(key)) for key in {**one, **other}}
    return {
        key: (old, new)
        for key, (old, new) in pairs.items()
        if old != new and not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], free: Collection[str], what: str) -> None:
    """Make sure that a run goes on with the configuration that it had, but for the keys `free`.

    Raises:
        UserError: there are `differences`, all of which are listed; `what` names the run or the checkpoint.
    """
    if different := differences(saved, current, free):
        listed = ", ".join(f"{key} ({old!r} there, {new!r} now)" for key, (old, new) in different.items())
        raise UserError(
            f"the configuration must be that of {what} to resume it. These keys differ: {listed}. Give the same "
            "values, or start a new run in another folder."
        )


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
