"""What a field of ``config.json`` is, and reading it with complaints in the user's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.errors import UserError

_TOO_LARGE = 1 << 31  # for a size, and for its product with another


@dataclass(frozen=True)
class Fields:
    """A ``config.json``.

    Attributes:
        given: The content of the file.
        where: The file, which begins messages.
    """

    given: Mapping[str, Any]
    where: str

    def wrong(self, name: str, required: str, value: object, hint: str | None = None) -> UserError:
        """The error of a field that must be something else."""
        return UserError(f"{self.where}: {name} must be {required}: got {value!r}.{hint or ''}")


@dataclass(frozen=True)
class Setting:
    """One field of ``config.json`` and the attributes of `Architecture` that it means.

    Attributes:
        name: Its name in the file.
        default: What transformers takes where the file does not have it. Its type says what values are allowed. A
            function of the fields and of the attributes that rows above have read gives a whole number.
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

    def value(self, fields: Fields, default: Any = None) -> Any:
        """What the file says, or else the default.

        Raises:
            UserError: if it is of another type than the default, or not allowed.
        """
        default = self.default if default is None else default
        value = fields.given.get(self.name)
        value = default if value is None else value
        match default:
            case bool():
                good, required = isinstance(value, bool), "true or false"
            case int():
                good = type(value) is int and self.least <= value < _TOO_LARGE
                above = type(value) is int and value >= _TOO_LARGE
                required = f"a whole number {f'below {_TOO_LARGE:,}' if above else f'of at least {self.least}'}"
            case float():
                good, required = type(value) in (int, float) and 0 <= value < float("inf"), "a number of at least 0"
            case _:
                words = list(self.values or ())
                good, required = value in words, f"one of {', '.join(words)}"
        if not good:
            raise fields.wrong(self.name, required, value, self.hint)
        return float(value) if isinstance(default, float) else value

    def read(self, fields: Fields, found: dict[str, Any]) -> None:
        """Add the attributes to `found`.

        Raises:
            UserError: if the value is wrong, or another than the constant or the value that an attribute has already.
        """
        if not self.attributes and self.hint is None:
            return
        if not self.attributes or self.attributes[0] in found:
            required = found[self.attributes[0]] if self.attributes else self.default
            value = fields.given.get(self.name)
            if (self.default if value is None else value) != required:
                raise fields.wrong(self.name, repr(required), self.default if value is None else value, self.hint)
            return
        default = self.default
        if callable(default):  # and asks other fields, which do not matter where the file has this one
            default = 0 if fields.given.get(self.name) is not None else default(fields, found)
        value = self.value(fields, default)
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
