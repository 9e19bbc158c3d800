"""The text of a trained run: what its folder keeps for evaluation, and the corpus that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.recipes._config import DataConfig, active_tasks
from moekit.recipes._data import open_sources
from moekit.recipes._parts import run_data
from moekit.training.run_folder import RunFolder, differences

_TEXT = (
    "source", "pivot", "directions", "max_languages", "babel_languages", "babel_sentences", "babel_sizes",
)  # fmt: skip
"""Settings of data that say which text is read; where it lies does not matter."""


def held_out_text(config: Any, data: MultitaskData) -> HeldOut:
    """What a run keeps of its text: the sentences that it is evaluated on."""
    return HeldOut.of(data, _settings(config.data))


def evaluation_data(config: Any, folder: RunFolder | None, rest: Mapping[str, Any], where: str) -> MultitaskData:
    """The data of a trained run for everything but training, from its folder; no corpus and no cache is looked at.

    Where the folder does not keep what the settings ask for, the corpus is read, and a line says so: in folders of
    former versions, for bare checkpoints, and where surgery has changed the settings of the data.

    Args:
        config: of the run.
        folder: the run's, None where there is only a checkpoint.
        rest: what its checkpoint holds beside weights.
        where: names the run in messages.

    Raises:
        UserError: what the folder keeps is damaged; or the corpus is read, and is not there or has changed so that its
            tokenizer is another than the run's.
    """
    held_out = None if folder is None else folder.held_out
    tokenizer = run_tokenizer(config, folder, rest, where)
    if held_out is None:
        if folder is not None and folder.tokenizer is not None:
            _say(f"{where} was made before runs kept their held-out text: it is that of its corpus as it is today.")
        return run_data(config, tokenizer)
    if reasons := _not_kept(held_out, config):
        _say(f"{where} keeps held-out text of other settings ({'; '.join(reasons)}): its corpus is read.")
        return run_data(config, tokenizer)
    return run_data(config, tokenizer, held_out)


def training_data(config: Any, folder: RunFolder | None, rest: Mapping[str, Any], where: str) -> MultitaskData:
    """The data of a trained run with its corpus, for training on.

    Raises:
        UserError: the corpus is not there, or has changed since.
    """
    tokenizer = run_tokenizer(config, folder, rest, where)
    data = run_data(config, tokenizer)
    require_same_text(config, data, folder, rest, where)
    return data


def run_tokenizer(config: Any, folder: RunFolder | None, rest: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a run was trained with: that of its folder.

    Folders of former versions, and checkpoints without a folder, have none. It is trained again then, or found in the
    cache, and a line says so.

    Raises:
        UserError: it is another than the one that the checkpoint was trained with.
    """
    tokenizer = None if folder is None else folder.tokenizer
    if tokenizer is None:
        _say(
            f"{where} has no tokenizer beside it, as runs have today: tokenizer and text are those of its corpus as it "
            "is now."
        )
        tokenizer = run_data(config).tokenizer
    trained_with = recorded(rest, "tokenizer")
    if trained_with is not None and not tokenizer.fingerprint.startswith(trained_with):
        remedy = (
            "The text has changed since then, and another came out of it: put it back as it was."
            if folder is None or folder.tokenizer is None
            else "Its folder was put together from several runs: take it from a copy."
        )
        raise UserError(
            f"{where} must be used with the tokenizer that it was trained with ({trained_with}): got "
            f"{tokenizer.fingerprint[:16]}. {remedy}"
        )
    return tokenizer


def require_same_text(
    config: Any, data: MultitaskData, folder: RunFolder | None, rest: Mapping[str, Any], where: str
) -> None:
    """Make sure that the corpus is that of the run.

    Raises:
        UserError: it is another; what differs is named.
    """
    held_out = None if folder is None else folder.held_out
    known: str | None
    then: Mapping[str, int]
    if held_out is None:
        known, then = recorded(rest, "source"), {}
    elif _other_settings(held_out, config):
        return  # surgery gave the run other text
    else:
        known, then = held_out.corpus.fingerprint, held_out.corpus.sentences
    if known is None or data.source.fingerprint().startswith(known):
        return
    raise UserError(
        f"the text must be the one that {where} was trained on: it has changed since then ({_changes(then, data)}). "
        "Put it back as it was, or start a run from this one with the new text: finetune --init_from."
    )


def corpus_note(config: Any, folder: RunFolder) -> str | None:
    """A line for those who test a run whose corpus is not what it was; None where it is."""
    held_out = folder.held_out
    if held_out is None or _not_kept(held_out, config):
        return None
    tested = "tested on the sentences that the folder keeps"
    try:
        source = open_sources(config.data)
    except UserError as error:
        return f"{tested}; the corpus is not here: {error}"
    if source.fingerprint() == held_out.corpus.fingerprint:
        return None
    return f"{tested}; the corpus is not what it was when the run was trained: its fingerprint differs"


def recorded(rest: Mapping[str, Any], name: str) -> str | None:
    """The beginning of the fingerprint of source or tokenizer that a checkpoint was trained with, where it says so."""
    settings = rest.get(MultitaskData.__qualname__, {}).get("settings", {})
    found: str | None = settings.get(name)
    return found


def _settings(config: DataConfig) -> dict[str, Any]:
    generated = any(kind in config.source for kind in ("babel", "headlines"))
    return {f"data.{name}": getattr(config, name) for name in (*_TEXT, *(["seed"] if generated else []))}


def _other_settings(held_out: HeldOut, config: Any) -> dict[str, tuple[Any, Any]]:
    return differences(held_out.settings, _settings(config.data))


def _not_kept(held_out: HeldOut, config: Any) -> list[str]:
    """What the settings ask for and the folder has not."""
    found = [f"{key} {new}, not {old}" for key, (old, new) in _other_settings(held_out, config).items()]
    found += [f"tasks.{name}" for name in active_tasks(config.tasks) if name not in held_out.tasks]
    for split, name in (("valid", "valid_sentences"), ("test", "max_sentences")):
        wanted, kept = getattr(config.evaluate, name), held_out.limits[split]
        if kept is not None and not 0 < wanted <= kept:
            found.append(f"evaluate.{name} {wanted}, not {kept}")
    return found


def _changes(then: Mapping[str, int], data: MultitaskData) -> str:
    now = {name: where.count for name, where in data.store.sections.items()}
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)] if then else []
    if not names:
        return "as many sentences, other words" if then else f"the fingerprint of its source, {data.source.name}"
    shown = [f"{name}: {then.get(name, 0):,} sentences then, {now.get(name, 0):,} now" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _say(line: str) -> None:
    """To standard error: standard output may be what a command was asked for."""
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(line)
