"""Mappings of a user's YAML file, taken apart key by key: what is missing, wrong or unknown is said with its place."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from typing import Any, get_args

from moekit.errors import UserError, nearest
from moekit.runs.plain import flatten
from moekit.runs.settings.fields import missed_range


class Part:
    """A mapping of a file, whose keys are taken one by one; what is left in the end is unknown."""

    def __init__(self, values: Mapping[str, Any], where: str, key: str = "") -> None:
        self.values, self.where, self.key, self.known = dict(values), where, key, set[str]()

    def fault(self, key: str, why: str) -> UserError:
        """The error of a key."""
        return UserError(f"{self.where}: {self.key}{key}: {why.removesuffix('.')}.")

    def take(self, key: str, kind: type | tuple[type, ...], words: str, default: Any = None) -> Any:
        """The value of a key; its default where it is left out, unless that is None."""
        self.known.add(key)
        if key not in self.values:
            if default is None:
                raise self.fault(key, f"is missing: {words}")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fault(key, f"must be {words}: got {value!r:.60}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Text, or a number as text."""
        found = str(self.take(key, (str, int, float), "text", default)).strip()
        if default is None and not found:
            raise self.fault(key, "must be text: got nothing")
        return found

    def number(self, key: str, default: float | None = None, **range: float) -> float:
        """A number; `range` as in `moekit.runs.settings.setting`."""
        with contextlib.suppress(KeyError, ValueError):  # YAML reads 1e-3 as text
            self.values[key] = float(self.values[key]) if isinstance(self.values[key], str) else self.values[key]
        found = float(self.take(key, (int, float), "a number", default))
        if missed := missed_range(found, range):
            raise self.fault(key, f"must be a number, {missed}: got {found:g}")
        return found

    def whole(self, key: str, default: int, **range: float) -> int:
        """A whole number; `range` as of `number`."""
        found = self.number(key, default, **range)
        if found != int(found):
            raise self.fault(key, f"must be a whole number: got {found:g}")
        return int(found)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        items = self.take(key, list, "a list of numbers")
        found = Part({str(i): item for i, item in enumerate(items)}, self.where, f"{self.key}{key}.")
        values = [found.number(str(i)) for i in range(len(items))]
        if not values:
            raise self.fault(key, "must be a list of numbers: it is empty")
        return values

    def seeds(self, key: str) -> list[int]:
        """A list of different seeds."""
        found = self.take(key, list, "a list of whole numbers")
        whole = [seed for seed in found if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31]
        if not found or len(whole) < len(found) or len(set(whole)) < len(whole):
            raise self.fault(key, f"must be different whole numbers from 0: got {found}")
        return whole

    def texts(self, key: str) -> list[str]:
        """A list of names; an empty one where it is left out."""
        found = self.take(key, list, "a list of names", [])
        if not all(isinstance(item, str) for item in found):
            raise self.fault(key, f"must be a list of names: got {found}")
        return found

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of plain values by names; an empty one where it is left out."""
        found = dict(self.take(key, dict, "a mapping", {}))
        self._check_plain(found, key)
        return found

    def _check_plain(self, value: Any, key: str) -> None:
        """Refuse what YAML reads and settings have not, such as dates and keys that are numbers."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if not isinstance(name, str):
                    raise self.fault(key, f"must have names as keys: got {name!r:.60}. Put it in quotes")
                self._check_plain(inner, f"{key}.{name}")
        elif isinstance(value, list):
            for inner in value:
                self._check_plain(inner, key)
        elif value is not None and not isinstance(value, (str, bool, int, float)):
            raise self.fault(
                key, f"must be text, a number or a list: got {value!r:.60}, of which YAML makes {_kind(value)}. "
                "Put it in quotes"
            )  # fmt: skip

    def settings(self, key: str) -> dict[str, Any]:
        """Settings of a run by dotted key, however they are nested."""
        found: dict[str, Any] = {}
        for name, value in self.mapping(key).items():
            inner = flatten({str(name): value})
            if twice := sorted(found.keys() & inner.keys()):
                raise self.fault(key, f"{twice[0]} is there twice")
            found |= inner
        return found

    def one_of(self, key: str, value: str, kind: Any) -> Any:
        """The value, which must be one of the words of a Literal."""
        if value not in get_args(kind):
            raise self.fault(key, f"must be one of {', '.join(get_args(kind))}: got {value!r}")
        return value

    def part(self, key: str) -> Part | None:
        """A mapping whose keys are taken in turn; None where it is left out."""
        self.known.add(key)
        return Part(self.mapping(key), self.where, f"{self.key}{key}.") if key in self.values else None

    def parts(self, key: str) -> dict[str, Part]:
        """A mapping of mappings."""
        found = self.take(key, dict, "a mapping from names to arms")
        if not found:
            raise self.fault(key, "must have at least one arm")
        for name, value in found.items():
            if value is not None and not isinstance(value, dict):
                raise self.fault(f"{key}.{name}", f"must be a mapping: got {value!r:.60}")
        return {str(name): Part(value or {}, self.where, f"{self.key}{key}.{name}.") for name, value in found.items()}

    def listed(self, key: str) -> list[Part]:
        """A list of mappings."""
        found = self.take(key, list, "a list of claims")
        for number, value in enumerate(found):
            if not isinstance(value, dict):
                raise self.fault(f"{key}[{number}]", f"must be a mapping: got {value!r:.60}")
        return [Part(value, self.where, f"{self.key}{key}[{number}].") for number, value in enumerate(found)]

    def end(self) -> None:
        """Refuse what nobody took."""
        for key in self.values:
            if key not in self.known:
                raise self.fault(str(key), f"unknown key. {nearest(str(key), self.known)}")


def _kind(value: Any) -> str:
    return "a date" if isinstance(value, datetime.date) else type(value).__name__
