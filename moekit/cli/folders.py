"""Folders of transformers in the place of runs: which a path is, and whose options are whose."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moekit.cli.command import location, number, say
from moekit.errors import UserError
from moekit.folder_kinds import kind_of, refuse_as_run

if TYPE_CHECKING:
    from moekit.runs.folders.text import TextChoice

FOLDER = ", or a folder of a transformers model (config.json and safetensors)"

_OF_TEXT: Mapping[str, Any] = {"data.source": None, "data.path": None, "data.languages": None, "tokens": 65_536,
                               "length": 512}  # fmt: skip
_OF_RUNS: Mapping[str, Any] = {
    "restart": False, "fresh_optimizer": False, "config": None, "plain": False, "language": None, "task": None,
    "recover": 0, "recover_rate": 0.0,
}  # fmt: skip


def text_options(parser: ArgumentParser, what: str) -> None:
    """The text that a folder's model reads."""
    group = parser.add_argument_group(f"for a transformers folder: the text {what}")
    group.add_argument(
        "--data.source",
        help="kind of text, such as jsonl: chats, completions, texts, or translations (default: jsonl for files that "
        "end in .jsonl, .json or .ndjson, else text)",
    )
    group.add_argument("--data.path", type=location, help="where the text lies")
    group.add_argument("--data.languages", help="languages to read, such as en,de (default: all)")
    group.add_argument(
        "--tokens", type=number(int, at_least=2), default=_OF_TEXT["tokens"], help="most tokens of a split"
    )
    group.add_argument(
        "--length", type=number(int, at_least=2), default=_OF_TEXT["length"], help="tokens of a sequence (default: 512)"
    )


def text_given(given: Namespace) -> TextChoice | None:
    """The text of the options; None where none was given.

    Raises:
        UserError: sizes or languages were given, and no text.
    """
    from moekit.data.sources.names import named_languages  # where it is used: a help text needs none of it
    from moekit.folder_text.splits import kind_of_file
    from moekit.runs.folders.text import TextChoice

    values = vars(given)
    source, place = values["data.source"], values["data.path"]
    if place is None and source in (None, "text"):
        if named := [name for name in _OF_TEXT if values[name] != _OF_TEXT[name]]:
            raise UserError(f"--{named[0]} is of the text that is read: give --data.path with it.")
        return None
    languages = named_languages(values["data.languages"]) or ()
    source = source or kind_of_file(place)
    return TextChoice(source=source, path=place, languages=languages, tokens=values["tokens"], length=values["length"])


def of_folder(given: Namespace, **only: Any) -> bool:
    """Whether a command is of a folder of transformers, whose options are then those alone; else those of runs.

    Args:
        given: the options, the path as ``run`` or ``path``.
        **only: the defaults of further options that are for folders alone.

    Raises:
        UserError: there is neither a model nor a run, or an option was given that is for the other.
    """
    values = vars(given)
    place: Path = values["run"] if "run" in values else values["path"]
    refuse_as_run(place, or_model=True)
    folder = kind_of(place) == "model"
    others = _OF_RUNS if folder else {**_OF_TEXT, **only}
    for name, default in others.items():
        if name in values and values[name] != default:
            whose, what = ("runs", "a folder of transformers") if folder else ("folders of transformers", "none")
            raise UserError(f"--{name.replace('_', '-')} is for {whose}: {place} is {what}. Leave it out.")
    return folder


def write_changed(given: Namespace, console: Console, make: Callable[[], Any]) -> None:
    """Make the changed model of a folder, and say what was written and how it opens."""
    import transformers  # where it is used: a help text needs none of it

    from moekit.runs.folders.changing import size_of

    transformers.utils.logging.disable_progress_bar()
    model = make()
    kind = type(model).__name__
    say(console, f"{given.out}: {kind}, {size_of(model)}\nopen it with {kind}.from_pretrained('{given.out}')")
