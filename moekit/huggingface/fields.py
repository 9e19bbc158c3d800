"""Reading ``config.json``: fields by name, with the defaults of transformers and complaints in the user's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.errors import UserError
from moekit.functional.activation import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu",
}  # fmt: skip


class Fields:
    """A configuration that fills in what transformers leaves out.

    Args:
        given: what the file says.
        defaults: of the class in transformers.
        where: begins messages.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.given, self.defaults, self.where = given, defaults, where

    def has(self, name: str) -> bool:
        """Whether the file says it."""
        return self.given.get(name) is not None

    def integer(self, name: str, least: int = 0) -> int:
        """A whole number."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{self.where}: {name} must be a whole number of at least {least}: got {value!r}.")
        return value

    def number(self, name: str) -> float:
        """A number that is not negative."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UserError(f"{self.where}: {name} must be a number of at least 0: got {value!r}.")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._value(name)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {name} must be true or false: got {value!r}.")
        return value

    def word(self, name: str, known: tuple[str, ...]) -> str:
        """One of some words."""
        value = self._value(name)
        if value not in known:
            raise UserError(f"{self.where}: {name} must be one of {', '.join(known)}: got {value!r}.")
        return str(value)

    def activation(self, name: str) -> Activation:
        """An activation function."""
        value = self._value(name)
        if value not in _ACTIVATIONS:
            raise UserError(
                f"{self.where}: {name} must be one of {', '.join(_ACTIVATIONS)}: got {value!r}. moekit has gelu in its "
                "tanh form only, and transformers' own sparse layers cannot run the gated ones."
            )
        return _ACTIVATIONS[value]

    def require(self, name: str, wanted: object, hint: str = "") -> None:
        """Raise UserError unless a field has the one value that moekit computes with."""
        value = self._value(name)
        if value != wanted:
            raise UserError(f"{self.where}: {name} must be {wanted!r}: got {value!r}.{hint}")

    def _value(self, name: str) -> Any:
        value = self.given.get(name)
        return self.defaults.get(name) if value is None else value


def their_activation(name: Activation) -> str:
    """What transformers calls an activation of ours."""
    return {"relu": "relu", "silu": "silu", "gelu": "gelu_pytorch_tanh"}[name]
