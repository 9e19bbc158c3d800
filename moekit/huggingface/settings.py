"""What a field of ``config.json`` is, and reading it with complaints in the user's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.errors import UserError


class Fields:
    """Values of a ``config.json`` by name, checked.

    Args:
        given: The content of the file.
        where: The file, which begins messages.
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.given, self.where = given, where

    def value(self, name: str, default: Any) -> Any:
        """What the file says, or the default."""
        value = self.given.get(name)
        return default if value is None else value

    def wrong(self, name: str, required: str, value: object, hint: str = "") -> UserError:
        """The error of a field that must be something else."""
        return UserError(f"{self.where}: {name} must be {required}: got {value!r}.{hint}")

    def integer(self, name: str, default: Any, least: int = 0) -> int:
        """A whole number.

        Raises:
            UserError: if it is none, or below `least`.
        """
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least}", value)
        return value

    def number(self, name: str, default: Any) -> float:
        """A number that is not negative.

        Raises:
            UserError: if it is none, or negative.
        """
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise self.wrong(name, "a number of at least 0", value)
        return float(value)


@dataclass(frozen=True)
class Setting:
    """One field of ``config.json`` and the attributes of `Architecture` that it means.

    Attributes:
        name: Its name in the file.
        default: What transformers takes where the file does not have it. Its type says what values are allowed. A
            function of the fields and of the attributes that rows above have read gives a default that depends on them.
        ours: The attribute, or several that have one value; the first is written. () = a constant, the default.
        least: The least whole number that is allowed.
        values: Ours for each of theirs; None = the same.
        none: The whole number that stands for None of ours, as do all above it; None = there is none.
        hint: The end of the message when the value is refused. A constant without one is written and not read.
        write: The value to write from attributes by name; None = the attribute's.
    """

    name: str
    default: Any
    ours: str | tuple[str, ...] = ()
    least: int = 1
    values: Mapping[Any, Any] | None = None
    none: int | None = None
    hint: str | None = None
    write: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes of `Architecture`."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def read(self, fields: Fields, found: dict[str, Any]) -> None:
        """Add the attributes to `found`.

        Raises:
            UserError: if the value is wrong, or another than one that is there already.
        """
        if not self.attributes and self.hint is None:
            return
        default = self.default(fields, found) if callable(self.default) else self.default
        value = fields.value(self.name, default)
        if not self.attributes or self.attributes[0] in found:
            required = found[self.attributes[0]] if self.attributes else default
            if value != required:
                raise fields.wrong(self.name, repr(required), value, self.hint or "")
            return
        if isinstance(default, bool) and not isinstance(value, bool):
            raise fields.wrong(self.name, "true or false", value)
        if isinstance(default, str) and value not in list(self.values or ()):
            raise fields.wrong(self.name, f"one of {', '.join(self.values or ())}", value, self.hint or "")
        if isinstance(default, int) and not isinstance(default, bool):
            value = fields.integer(self.name, default, self.least)
        elif isinstance(default, float):
            value = fields.number(self.name, default)
        if self.none is not None and value >= self.none:
            value = None
        found |= dict.fromkeys(self.attributes, value if self.values is None else self.values[value])

    def written(self, ours: Mapping[str, Any]) -> Any:
        """The value for ``config.json`` from attributes by name."""
        if self.write is not None or not self.attributes:
            return self.write(ours) if self.write is not None else self.default
        value = ours[self.attributes[0]]
        if self.values is not None and value not in self.values:
            value = [theirs for theirs, mine in self.values.items() if mine == value][-1]
        return self.none if value is None else value
