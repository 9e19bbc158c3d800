"""What is known of a setting beside its type and default: its range, and where it may differ."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal

from moekit.errors import UserError

Where = Literal["resume", "surgery"]
"""Where a setting may differ: between a run and its continuation, or between runs whose models are aggregated."""

RESUME: tuple[Where, ...] = ("resume",)
SURGERY: tuple[Where, ...] = ("surgery",)


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    free: Collection[Where] = (),
) -> Any:
    """A dataclass field that is a setting.

    A subclass that only gives it another default keeps the rest.

    Args:
        default: the value where none is given.
        default_factory: makes it.
        at_least: the least number, or the least of each number of a list; where 0 means none, no limit or all, it is 0.
        above: a number that the setting is greater than.
        below: a number that it is less than.
        free: where it may differ; of a group of settings, all of them.
    """
    known = {"at_least": at_least, "above": above, "below": below, "free": tuple(free)}
    metadata = {key: value for key, value in known.items() if value not in (None, ())}
    made: Any = field(default=default, default_factory=default_factory, metadata=metadata)
    return made


def known_of(group: Any, name: str) -> dict[str, Any]:
    """What is known of the field `name` of a dataclass, by its own definition and those of its bases."""
    kind = group if isinstance(group, type) else type(group)
    bases = [base.__dict__["__dataclass_fields__"] for base in reversed(kind.__mro__) if is_dataclass(base)]
    return {key: value for found in bases if name in found for key, value in found[name].metadata.items()}


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Dotted key, value and what is known, of every setting of a configuration and of every group of them."""
    for f in fields(config):
        key, value = f"{prefix}{f.name}", getattr(config, f.name)
        yield key, value, known_of(config, f.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.")


def free_keys(config: Any, where: Where) -> list[str]:
    """Dotted keys of the settings, and of the groups of settings, that may differ there."""
    return [key for key, _, known in settings_of(config) if where in known.get("free", ())]


def check_ranges(config: Any) -> None:
    """Hold the numbers of a configuration to their ranges, before anything is read or made.

    Words such as auto are passed over.

    Raises:
        UserError: one is out of its range, or is no number; the message has the key, its range and what was given.
    """
    for key, value, known in settings_of(config):
        numbers = value if isinstance(value, tuple) else (value,)
        given = list(value) if isinstance(value, tuple) else value
        least, above, below = (known.get(name) for name in ("at_least", "above", "below"))
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if above is not None and not (math.isfinite(number) and number > above):
                raise UserError(f"{key} must be greater than {above}: got {given}.")
            if least is None or (math.isfinite(number) and number >= least and (below is None or number < below)):
                continue
            limits = f"{least} or more" + ("" if below is None else f" and less than {below}")
            several = "two numbers of " if isinstance(value, tuple) else ""
            raise UserError(f"{key} must be {several}{limits}: got {given}.")
