"""YAML files of users: read whole or refused in one line, however they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moekit.errors import UserError
from moekit.stored import parse_yaml

_MAX_BYTES = 2**20
_MAX_NODES = 20_000
"""Of values once all aliases stand for what they name: a thousand times a configuration."""


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """What a YAML file holds.

    Args:
        path: the file.
        what: begins the message of an error: the option, or the path.

    Raises:
        UserError: it cannot be read, is no UTF-8, no YAML or larger than a configuration can be, a key stands twice in
            a mapping, an alias names what it stands in, or it holds no mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        text = data.decode("utf-8-sig")
        values = parse_yaml(text, _require_plain)
    except UnicodeDecodeError as error:
        at = f"the byte 0x{error.object[error.start]:02x} at {error.start}"
        raise UserError(f"{what} must be a YAML file in UTF-8: {path} has {at}. Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} must be a readable YAML file: got {path} ({reason}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a file that holds a mapping: {path} holds {type(values).__name__}.")
    return values


def _require_plain(node: yaml.Node | None) -> None:
    """Look at every value as often as it stands in the file's meaning, before anything is made of it.

    Raises:
        ValueError: a value holds itself, there are too many, or a key stands twice.
    """
    seen = 0

    def visit(node: yaml.Node | None, above: tuple[yaml.Node, ...]) -> None:
        nonlocal seen
        seen += 1
        if node in above:
            raise ValueError(f"the value in line {above[-1].start_mark.line + 1} holds itself")
        if seen > _MAX_NODES:
            raise ValueError(f"it has more than {_MAX_NODES:,} values, what its aliases repeat included")
        if isinstance(node, yaml.MappingNode):
            keys: set[Any] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise ValueError(f"the key {key.value!r} is there twice, again in line {key.start_mark.line + 1}")
                keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
                visit(value, (*above, node))
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                visit(value, (*above, node))

    visit(node, ())
