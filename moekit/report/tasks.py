"""What a run's tasks are called and how their samples are worded, as its summary.json says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class SampleWording:
    """How the samples of a task are presented.

    Attributes:
        title: heading of the section.
        lead: what the samples are, and what the marked words mean.
        source: name of what the model was given.
        reference: name of what would have been right.
        noun: what one sample is.
        unknown: heading of samples that do not say their direction or language.
    """

    title: str = "Samples"
    lead: str = "Held-out texts the model never saw. Marked words stand in the expected text too, in the same order."
    source: str = "Input"
    reference: str = "Expected"
    noun: str = "text"
    unknown: str = "language not recorded"


@dataclass(frozen=True)
class TaskWording:
    """How a task is presented; `perplexity` says whether it predicts tokens, so that exp(loss) has a meaning."""

    title: str
    explanation: str = "Loss of this task."
    perplexity: bool = True
    samples: SampleWording = SampleWording()


# Of records from before a run's summary named its tasks.
_OLDER = {
    "translation": TaskWording("Translation", "Write a sentence in another language, word by word."),
    "denoising": TaskWording("Denoising", "Restore a sentence from which words were cut or dropped."),
    "masked_lm": TaskWording("Masked words", "Guess the words hidden in a sentence, in the encoder alone."),
    "replaced_token": TaskWording(
        "Replaced-token detection", "Tell which words of a sentence a small generator has replaced.", perplexity=False
    ),
    "causal_lm": TaskWording("Next word", "Guess the next word of a text."),
    "": TaskWording("Total", "The sum of all tasks and the routers' penalties."),
}
_OLDER_SAMPLES = {
    "translation": ("Sample translations", "Source", "Reference", "sentence", "direction not recorded"),
    "denoising": ("Samples of restored text", "Damaged", "Original", "text", "language not recorded"),
    "causal_lm": ("Sample continuations", "Prompt", "True continuation", "text", "language not recorded"),
}


def task_wording(summary: Mapping[str, Any], task: str) -> TaskWording:
    """The wording in ``summary["tasks"][task]``, a neutral one for what is not there."""
    found = _OLDER.get(task) or TaskWording(task.replace("_", " ").capitalize())
    if older := _OLDER_SAMPLES.get(task):
        title, *rest = older
        found = replace(found, samples=SampleWording(title, SampleWording.lead, *rest))
    tasks = summary.get("tasks")
    said = tasks.get(task) if isinstance(tasks, Mapping) else None
    if not isinstance(said, Mapping):
        return found
    if isinstance(said.get("samples"), Mapping):
        names = [f.name for f in fields(SampleWording)]
        found = replace(found, samples=replace(found.samples, **_texts(said["samples"], names)))
    if isinstance(said.get("perplexity"), bool):
        found = replace(found, perplexity=said["perplexity"])
    return replace(found, **_texts(said, ["title", "explanation"]))


def task_order(summary: Mapping[str, Any], task: str) -> tuple[int, str]:
    """Sorts tasks as the record names them, a task that nobody names by its name at the end."""
    tasks = summary.get("tasks")
    order = [*(tasks if isinstance(tasks, Mapping) else ()), *_OLDER]
    return order.index(task) if task in order else len(order), task


def _texts(said: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: said[name] for name in names if isinstance(said.get(name), str)}
