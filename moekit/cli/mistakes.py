"""What is wrong with the options of a command that has settings: each one is looked at by itself."""

from __future__ import annotations

import math
import types
import typing
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser

from moekit.cli.command import location, number, option_value
from moekit.errors import UserError, nearest
from moekit.runs.settings.fields import missed_range
from moekit.runs.yaml_file import read_mapping

NOT_PARSED = (ArgumentError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What the parser raises of values. Some, such as `!!int`, make PyYAML look into tables and empty texts."""

_MAX_SHOWN = 120
_MAX_NAMES = 12  # more are no help in a message
_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
    location: "the name of a file or a folder",
}  # fmt: skip


class OtherCommandsOption(Action):
    """An option of other commands, named in `const`: files of settings may hold it, and the command line may not."""

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        """Refuse it."""
        raise ArgumentError(self, self.said)

    @property
    def said(self) -> str:
        """Whose option it is."""
        return f"{self.option_strings[0]} is an option of {', '.join(self.const)}, not of this command. Leave it out."


def explain(error: str, parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """What is required of `arguments`, what was got and what to do; the parser's own `error` where nothing is found."""
    vars(parser).pop("print_config", None)  # what --print_config left, which would print each value that is tried here
    known = _known(parser)
    file = option_value(arguments, "--config") if "config" in known else None
    for key, value in _flat({} if file is None else read_mapping(Path(file), "--config"), known):
        if key not in known:
            return f"{file}: unknown key {key} in the configuration. {_hint(key, known)}"
        if not _fits(parser, key, value):
            return f"{file}: {key} must be {_required(known[key])}: got {_shown(value)}."
    rest = iter(arguments)
    for item in rest:
        key, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--"):
            return f"unexpected argument {item!r}. Options begin with --; see --help."
        if (action := known.get(key.removesuffix("+")) or _parent(key, known)) is None:
            return f"unknown option --{key}. {_hint(key, known, '--')}"
        if isinstance(action, OtherCommandsOption):
            return action.said
        if action.nargs == 0:
            continue
        value = value if equals else next(rest, "--")
        if value.startswith("--") and not equals:
            return f"--{key} needs a value: {_required(action)}."
        key = key.removesuffix("+")
        if action.dest != "config" and not _fits(parser, key, value):
            whole, _, part = (key, "", "") if key in known else key.rpartition(".")
            return f"{whole} must be {_required(action)}: got {part and part + ': '}{_shown(value)}."
    return " ".join(error.split())


def require_settings(parser: ArgumentParser, files: Sequence[str]) -> None:
    """Look at files of settings for what the parser would stumble over.

    Raises:
        UserError: one is no plain YAML, or has a value where a group of settings must be.
    """
    known = _known(parser)
    groups = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    for file in files:
        stored = read_mapping(Path(file), "--config")
        for key in sorted(groups, key=lambda key: key.count(".")):
            value: Any = stored
            for name in key.split("."):
                value = value.get(name, {})
            if not isinstance(value, Mapping):
                raise UserError(f"{file}: {key} must be a mapping of settings: got {_shown(value)}. Leave it out.")


def _known(parser: ArgumentParser) -> dict[str, Any]:
    """The options by name."""
    return {word.removeprefix("--"): a for a in parser._actions for word in a.option_strings if word != "-h"}


def _flat(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a mapping that is the value of an option is one value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_group = isinstance(value, Mapping) and any(word.startswith(f"{key}.") for word in known)
        yield from _flat(value, known, f"{key}.") if is_group else [(key, value)]


def _parent(key: str, known: Mapping[str, Any]) -> Any:
    """The option whose value has this key, as in ``--data.babel_sizes.kmb``."""
    parent, dot, _ = key.rpartition(".")
    action = known.get(parent) if dot else None
    return action if action is not None and "dict" in str(getattr(action, "_typehint", "")) else None


def _fits(parser: ArgumentParser, key: str, value: Any) -> bool:
    nested = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    try:
        parser.parse_object(nested)
    except NOT_PARSED:
        return False
    return True


def _hint(key: str, known: Mapping[str, Any], dashes: str = "") -> str:
    """The nearest of all names; else all, but for groups of settings and what only prints."""
    names = [
        name
        for name, action in known.items()
        if not name.startswith("print_") and not isinstance(action, OtherCommandsOption)
        if not any(k.startswith(f"{name}.") for k in known)
    ]
    hint, _, every = nearest(f"{dashes}{key}", [f"{dashes}{name}" for name in names]).partition("There ")
    if len(names) > _MAX_NAMES and not hint:
        return f"There are {len(names)}: --help lists them."
    return hint.replace("'", "").strip() or f"There {every}"


def _required(action: Any) -> str:
    if action.choices:
        return _words(typing.Literal[tuple(action.choices)], None)
    if action.type is None and not hasattr(action, "_typehint"):
        return "a mapping of settings"
    if isinstance(action.type, number):
        return f"{action.type.words}, {missed_range(math.nan, action.type.known)}"
    return _words(getattr(action, "_typehint", action.type), action.default)


def _shown(value: Any) -> str:
    """A value as it was written, but for the middle of a long one."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"


def _words(kind: Any, example: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and len(parts) > 1:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, example) for part in parts))
    if origin is tuple:
        shown = "[" + ",".join(map(str, example)) + "]" if isinstance(example, list | tuple) else "[one,two]"
        return f"a list in brackets, such as {shown}"
    if parts and origin is typing.Literal:
        return str(parts[0])
    return "a mapping, such as {name: 2000}" if origin is dict else _WORDS.get(kind, "a value of its type")
