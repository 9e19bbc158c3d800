"""What is known of a setting beside its type and default: its range, and where it may differ."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal

from moekit.errors import UserError

Where = Literal["resume", "surgery"]
"""Where a setting may differ: between a run and its continuation, or between runs whose models are aggregated."""

_MOST = 2**31 - 1
"""Above it no setting makes sense, and not all that use one can hold it."""

RESUME: tuple[Where, ...] = ("resume",)
SURGERY: tuple[Where, ...] = ("surgery",)


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
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
        at_most: the greatest number; 2 ** 31 - 1 where neither this nor `below` is said.
        below: a number that it is less than.
        free: where it may differ; of a group of settings, all of them.
    """
    known = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "free": tuple(free)}
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
        yield key, value, known_of(config, f.name) | {"optional": f.default is None or "None" in str(f.type)}
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.")


def free_keys(config: Any, where: Where) -> list[str]:
    """Dotted keys of the settings, and of the groups of settings, that may differ there."""
    return [key for key, _, known in settings_of(config) if where in known.get("free", ())]


def check_ranges(config: Any, prefix: str = "") -> None:
    """Hold the settings of a configuration to their ranges, before anything is read or made.

    Every number must be one and have a bound above, and no text may be empty. Words such as auto are passed over.

    Args:
        config: the configuration, or a group of settings.
        prefix: what its keys begin with.

    Raises:
        UserError: one is out of its range; the message has the key, its range and what was given.
    """
    for key, value, known in settings_of(config, prefix):
        if value is None and not known["optional"]:
            raise UserError(f"{key} must have a value: got null. Leave it out for the default.")
        several = isinstance(value, tuple | Mapping)
        for one in (value.values() if isinstance(value, Mapping) else value) if several else (value,):
            if isinstance(one, str) and not one.strip():
                raise UserError(f"{key} must not be empty: got {value!r}.")
            if isinstance(one, bool) or not isinstance(one, int | float):
                continue
            if words := missed_range(one, known):
                given = list(value) if isinstance(value, tuple) else value
                raise UserError(f"{key} must be {'numbers of ' if several else ''}{words}: got {given!s:.80}.")


def missed_range(number: float, known: Mapping[str, Any]) -> str:
    """The range that a number is not in, in words; "" where it is in it.

    Args:
        number: any, NaN too, which is in no range.
        known: some of `at_least`, `above`, `at_most` and `below` as in `setting`.
    """
    least, above, below = known.get("at_least", -_MOST), known.get("above", -math.inf), known.get("below", math.inf)
    if least <= number <= known.get("at_most", _MOST) and above < number < below:
        return ""
    said = {"at_least": "{} or more", "above": "greater than {}", "at_most": "at most {}", "below": "less than {}"}
    words = [text.format(known[name]) for name, text in said.items() if name in known]
    if number > _MOST and not {"at_most", "below"} & known.keys():  # every number has this bound: said where it is met
        words.append(f"at most {_MOST}")
    return " and ".join(words) or "a number"
