"""A run that ended before its schedule did: how far it came, why, and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moekit.report.run_folder import RunFolder, dig, number
from moekit.report.wording import nearby, percent
from moekit.runs.record import Ending
from moekit.shell import command_line, moekit_words, typed_again

_TRAINS = ("run", "fit", "finetune", "distill")
_MARGIN = 1.1  # of the time that the rest should take: machines are not always as fast


@dataclass(frozen=True)
class Cut:
    """What is said of a run that was cut: in full, in two lines of a terminal, and the command that goes on."""

    text: str
    lines: Sequence[str]
    command: str


def cut(run: RunFolder) -> Cut | None:
    """What is said of a run that has no result yet, went on after it, or ended before its schedule did.

    None of any other, and where nobody wrote down how it ended.
    """
    if not run.summary:
        return _unfinished(run)
    if run.trained_since:
        return _trained_on(run)
    try:
        end = Ending.from_json(dig(run.summary, "ending"))
    except ValueError:
        return None
    if end.by not in _CAUSES:
        return None
    whole = f" of {end.max_steps:,}" if end.max_steps else ""
    cause = _CAUSES[end.by].format(signal=end.signal or "a signal")
    limit = f" (train.max_minutes={end.max_minutes or 0:g})" if end.by == "clock" else ""
    far = f"after {end.steps:,}{whole} steps, {percent(end.done, 0)} of the schedule"
    rate = _rate(end)
    command = _command(run, end)
    text = f"{cause}{limit} {far}.{f' {rate}.' if rate else ''}"
    return Cut(text, [f"{cause} {far}", *([rate] if rate else [])], command)


def _unfinished(run: RunFolder) -> Cut | None:
    """A run that has no result yet: it goes on, or a signal or an error ended it."""
    if not run.steps:
        return None
    whole = number(run.settings, "train", "max_steps")
    text = f"Not finished after {run.steps:,}{f' of {int(whole):,}' if whole else ''} steps"
    values = [] if run.learning_rate is None else run.learning_rate.finite.value.tolist()
    if values and max(values) > 0:
        rate = f"The learning rate was at {percent(values[-1] / max(values), 0)} of its highest"
        return Cut(f"{text}. {rate}.", [text, rate], _goes_on(run))
    return Cut(f"{text}.", [text], _goes_on(run))


def _trained_on(run: RunFolder) -> Cut:
    """A run that was tested, and trained further since."""
    text = f"Trained on to step {run.trained_since:,} since its test, which was after {run.steps:,} steps"
    return Cut(f"{text}: scores are of then.", [text], _goes_on(run))


def _goes_on(run: RunFolder) -> str:
    """What goes on from the last checkpoint; "" where there is none."""
    return _training(run, ["--resume"]) if (run.path / "checkpoints" / "last.ckpt").exists() else ""


_CAUSES = {
    "clock": "Cut by its clock",
    "interrupted": "Interrupted by {signal}",
    "stopped": "Stopped by an error or a callback",
}
"""What ended a run before the end of its schedule."""


def _rate(end: Ending) -> str:
    """Where the learning rate was, which decides much of what a run comes to; "" where it was to stay."""
    now, last = end.learning_rate, end.last_learning_rate
    if now is None or last is None or last >= 1:
        return ""
    if end.rising:
        return f"The learning rate was still rising, at {percent(now, 0)} of its peak"
    had = "had not fallen from" if now > 0.995 else f"had fallen only to {percent(now, 0)} of"
    return f"The learning rate {had} its peak; it ends at {percent(last, 0)}"


def _command(run: RunFolder, end: Ending) -> str:
    """What trains the rest of the schedule; "" where nobody knows the recipe."""
    more = ["--resume"]
    if end.by == "clock" and end.max_steps:
        more += ["--train.max_minutes", str(math.ceil(_MARGIN * end.minutes * end.max_steps / end.steps))]
    return _training(run, more)


def _training(run: RunFolder, more: Sequence[str]) -> str:
    """What trains the run with `more`; "" where nobody knows how."""
    if again := _again(run, more):
        return again
    config, folder = nearby(run.path / "config.yaml"), nearby(run.path)
    return command_line("run", run.recipe, "--config", config, "--out", folder, *more) if run.recipe else ""


def _again(run: RunFolder, more: Sequence[str]) -> str:
    """The recorded command with `more`; "" where none is recorded."""
    recorded = run.environment.get("command")
    words = moekit_words(recorded) if isinstance(recorded, list) else []
    return typed_again([*_without(words, more), *more]) if words[1:2] and words[1] in _TRAINS else ""


def _without(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """A recorded command without what `more` says anew, and without what begins anew."""
    kept, skipped = [], False
    options = {word for word in more if word.startswith("--")}
    for word in words:
        option, equals, _ = word.partition("=")
        if skipped:
            skipped = False
        elif option in options and option != "--resume":
            skipped = not equals  # its value
        elif word not in ("--resume", "--overwrite"):
            kept.append(word)
    return kept
