"""The text of a trained run: what its folder keeps for evaluation, and the corpus that it was trained on.

`config` gives the settings of the data where they are not the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.data.held_out import HeldOut
from moekit.data.module import MultitaskData
from moekit.data.tokenizer import Tokenizer
from moekit.errors import UserError
from moekit.runs.config import RunConfig
from moekit.runs.plain import differences, plain
from moekit.runs.recipe import structured
from moekit.runs.run import Run
from moekit.runs.settings.tasks import active_tasks
from moekit.terminal import Terminal


def evaluation_data(run: Run, config: RunConfig | None = None) -> MultitaskData:
    """The data of a trained run for everything but training, from its folder; no corpus and no cache is looked at.

    Where the folder does not keep what the settings ask for, the corpus is read, and a line says so: in folders of
    former versions, for bare checkpoints, and where surgery has changed the settings of the data.

    Raises:
        UserError: what the folder keeps is damaged; or the corpus is read, and is not there or has changed so that its
            tokenizer is another than the run's.
    """
    config = config or run.config
    held_out = run.held_out
    tokenizer = tokenizer_of(run, config)
    if held_out is None:
        if run.kept_tokenizer is not None:
            _say(f"{run.path} was made before runs kept their held-out text: it is that of its corpus as it is today.")
    elif reasons := _not_kept(held_out, config):
        _say(f"{run.path} keeps held-out text of other settings ({'; '.join(reasons)}): its corpus is read.")
        held_out = None
    return config.batches(tokenizer, held_out)


def training_data(run: Run, config: RunConfig | None = None) -> MultitaskData:
    """The data of a trained run with its corpus, for training on.

    Raises:
        UserError: the corpus is not there, or has changed since.
    """
    config = config or run.config
    data = config.batches(tokenizer_of(run, config))
    require_same_text(run, data, config)
    return data


def tokenizer_of(run: Run, config: RunConfig | None = None) -> Tokenizer:
    """The tokenizer that a run was trained with: that of its folder.

    Folders of former versions, and checkpoints without a folder, have none. It is trained again then, or found in the
    cache, and a line says so.

    Raises:
        UserError: it is another than the one that the checkpoint was trained with.
    """
    tokenizer = run.kept_tokenizer
    kept = tokenizer is not None
    if tokenizer is None:
        _say(
            f"{run.path} has no tokenizer beside it, as runs have today: tokenizer and text are those of its corpus as "
            "it is now."
        )
        tokenizer = (config or run.config).batches().tokenizer
    trained_with = recorded(run, "tokenizer")
    if trained_with is not None and not tokenizer.fingerprint.startswith(trained_with):
        remedy = (
            "Its folder was put together from several runs: take it from a copy."
            if kept
            else "The text has changed since then, and another came out of it: put it back as it was."
        )
        raise UserError(
            f"{run.path} must be used with the tokenizer that it was trained with ({trained_with}): got "
            f"{tokenizer.fingerprint[:16]}. {remedy}"
        )
    return tokenizer


def tokenizer_digest(run: Run) -> str | None:
    """The beginning of the fingerprint of the tokenizer that a run was trained with, where that is known."""
    tokenizer = run.kept_tokenizer
    return recorded(run, "tokenizer") if tokenizer is None else tokenizer.fingerprint[:16]


def require_same_text(run: Run, data: MultitaskData, config: RunConfig | None = None) -> None:
    """Make sure that the corpus of `data` is that of the run.

    Raises:
        UserError: it is another; what differs is named.
    """
    held_out = run.held_out
    if held_out is not None and _other_settings(held_out, config or run.config):
        return  # surgery gave the run other text
    known = recorded(run, "source") if held_out is None else held_out.corpus.fingerprint
    if known is None or data.source.fingerprint().startswith(known):
        return
    then = {} if held_out is None else held_out.corpus.sentences
    raise UserError(
        f"the text must be the one that {run.path} was trained on: it has changed since then ({_changes(then, data)}). "
        "Put it back as it was, or start a run from this one with the new text: finetune --init_from."
    )


def corpus_note(run: Run) -> str | None:
    """A line for those who test a run whose corpus is not what it was; None where it is."""
    held_out = run.held_out
    if held_out is None or _not_kept(held_out, run.config):
        return None
    tested = "tested on the sentences that the folder keeps"
    try:
        source = run.config.data.open()
    except UserError as error:
        return f"{tested}; the corpus is not here: {error}"
    if source.fingerprint() == held_out.corpus.fingerprint:
        return None
    return f"{tested}; the corpus is not what it was when the run was trained: its fingerprint differs"


def recorded(run: Run, name: str) -> str | None:
    """The beginning of the fingerprint of the source or tokenizer of a run, if its checkpoint has it."""
    found: str | None = run.rest.get(MultitaskData.__qualname__, {}).get("settings", {}).get(name)
    return found


def _other_settings(held_out: HeldOut, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    now = plain(config.data.which_text())
    then = dict(held_out.settings)
    lists = structured({key.removeprefix("data."): value for key, value in then.items()})
    return differences({**then, **{f"data.{name}": value for name, value in lists.items()}}, now)


def _not_kept(held_out: HeldOut, config: RunConfig) -> list[str]:
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
    Terminal(stderr=True, soft_wrap=True).print(line)
